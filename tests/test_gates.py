"""The small gates against records of the published modules in float64, gradients included."""

import re
from collections.abc import Callable

import golden
import pytest
import torch
from torch import Tensor, nn

from tessel.blocks import DeepLocalAttention, EfficientLocalAttention, GaussianGate, Residual, SubspaceGate

GATES = {
    "ela_ela72_c64": lambda: EfficientLocalAttention(64),
    "ela_ela73_c64": lambda: EfficientLocalAttention(64, kernel=5, groups=1, norm_groups=32),
    "ela_depthwise_c64_k7": lambda: EfficientLocalAttention(64, groups=64, norm_groups=32),
    "ela_ela84_c64": lambda: DeepLocalAttention(64),
    "gaam_channels": lambda: GaussianGate(24, num_heads=4, num_gaussians=3),
    "gaam_tokens": lambda: GaussianGate(30, num_heads=2),
    "gaam_block": lambda: nn.Sequential(*(Residual(GaussianGate(24)) for _ in range(3))),
    "ulsam_c12_g1": lambda: SubspaceGate(12, groups=1),
    "ulsam_c24_g3": lambda: SubspaceGate(24, groups=3),
    "ulsam_c24_g4_train": lambda: SubspaceGate(24),
}
NAMES = {"conv1": "conv", "gn": "norm", "mean_offsets": "offset"}
NAMES |= {"conv_dws": "scale", "bn_dws": "norm1", "conv_point": "point", "bn_point": "norm2"}


def our_name(key: str) -> str:
    """The parameter that holds a published one; heads are rows of one parameter, and groups parts of one layer."""
    key = re.sub(r"^layers\.(\d+)\.", r"\1.fn.", key)
    key = re.sub(r"(attention_heads|subspaces)\.\d+\.", "", key)
    return ".".join(NAMES.get(part, part) for part in key.split("."))


def gathered(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published parameters or gradients with our keys."""
    parts: dict[str, list[Tensor]] = {}
    for key, tensor in published.items():
        parts.setdefault(our_name(key), []).append(tensor[None] if "attention_heads" in key else tensor)
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
    # of weak gates the record has what they add to x, too, as its first output
    outputs = [y - x, y] if len(record["outputs"]) == 2 else [y]
    if "logits" in record:
        assert golden.relative_error(outputs[0], record["logits"]) <= 1e-9
    else:
        pooled = torch.nn.functional.adaptive_avg_pool2d(outputs[0], 2)
        assert golden.relative_error(pooled, record["features"][0]["pooled"]) <= 1e-9
    sum((output * golden.draw(f"loss{i or ''}", drawn.shape)).sum() for i, output in enumerate(outputs)).backward()
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
        DeepLocalAttention(4, norm_groups=2),
        GaussianGate(4, num_heads=2),
        SubspaceGate(4, groups=2).eval(),
    ):
        x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
        gate = gate.double()
        assert torch.autograd.gradcheck(lambda x, *_, gate=gate: gate(x), (x, *gate.parameters()), fast_mode=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EfficientLocalAttention(24), "dim=24.*norm_groups=16"),
        (lambda: EfficientLocalAttention(16, kernel=4), r"kernel=4"),
        (lambda: DeepLocalAttention(32, second_kernel=4), "second_kernel=4"),
        (lambda: SubspaceGate(6, groups=4), "dim=6.*groups=4"),
        (lambda: GaussianGate(4, num_heads=4), "dim=4.*num_heads=4"),
    ],
)
def test_constructor_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
