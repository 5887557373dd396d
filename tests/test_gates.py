"""The small gates against records of the published modules in float64, gradients included."""

import re
from collections.abc import Callable

import golden
import pytest
import torch
from torch import Tensor, nn

from tessel.blocks import EfficientLocalAttention, GaussianGate

GATES = {
    "ela_ela72_c64": lambda: EfficientLocalAttention(64),
    "ela_ela73_c64": lambda: EfficientLocalAttention(64, kernel=5, groups=1, norm_groups=32),
    "ela_depthwise_c64_k7": lambda: EfficientLocalAttention(64, groups=64, norm_groups=32),
    "gaam_channels": lambda: GaussianGate(24, num_heads=4, num_gaussians=3),
    "gaam_tokens": lambda: GaussianGate(30, num_heads=2),
}
NAMES = {"gn": "norm", "mean_offsets": "offset"}


def our_name(key: str) -> str:
    """The parameter that holds a published one; heads are rows of one parameter."""
    key = re.sub(r"^attention_heads\.\d+\.", "", key)
    first, dot, last = key.partition(".")
    return NAMES.get(first, first) + dot + last


def gathered(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published parameters or gradients with our keys."""
    parts: dict[str, list[Tensor]] = {}
    for key, tensor in published.items():
        parts.setdefault(our_name(key), []).append(tensor[None] if key.startswith("attention_heads") else tensor)
    return {key: torch.cat(tensors) for key, tensors in parts.items()}


@pytest.mark.parametrize(("name", "make"), GATES.items(), ids=list(GATES))
def test_equals_the_record(name: str, make: Callable[[], nn.Module]):
    record = golden.load(f"modules/{name}")
    gate = make().double().train(record["mode"] == "train")
    state = gathered(golden.published_state(record))
    assert gate.load_state_dict(state, strict=False).unexpected_keys == []
    drawn = golden.draw("input", record["input_shape"])
    x = (drawn if drawn.dim() == 4 else drawn[..., None]).requires_grad_()
    y = gate(x).view(drawn.shape)
    if "logits" in record:
        assert golden.relative_error(y, record["logits"]) <= 1e-9
    else:
        pooled = torch.nn.functional.adaptive_avg_pool2d(y, 2)
        assert golden.relative_error(pooled, record["features"][0]["pooled"]) <= 1e-9
    (y * golden.draw("loss", drawn.shape)).sum().backward()
    assert float(x.grad.norm()) == pytest.approx(record["input_grad_norm"], rel=1e-9)
    squares: dict[str, float] = {}
    for key, norm in record["grad_norms"].items():
        squares[our_name(key)] = squares.get(our_name(key), 0.0) + norm**2
    for key, square in squares.items():
        assert float(gate.get_parameter(key).grad.norm()) == pytest.approx(square**0.5, rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize("size", [(1, 1), (2, 5)], ids=str)
def test_gradcheck_of_tiny_maps(size):
    for gate in (
        EfficientLocalAttention(4, norm_groups=2),
        GaussianGate(4, num_heads=2),
    ):
        x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
        gate = gate.double()
        assert torch.autograd.gradcheck(lambda x, *_, gate=gate: gate(x), (x, *gate.parameters()), fast_mode=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EfficientLocalAttention(24), "dim=24.*norm_groups=16"),
        (lambda: EfficientLocalAttention(16, kernel=4), r"kernel=4"),
        (lambda: GaussianGate(4, num_heads=4), "dim=4.*num_heads=4"),
    ],
)
def test_constructor_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
