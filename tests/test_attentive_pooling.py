"""Attentive poolings against records of the published modules in float64, gradients included."""

import re
from typing import Any

import golden
import pytest
import torch
from torch import Tensor, nn

from tessel.blocks import POOLINGS

RECORDS = ["ep_probe_c128_q16_dout4", "ep_probe_c384_q32", "ep_probe_c96_q8", "ep_probe_c96_q8_train"]
RECORDS += [f"probe_{name}_c96" for name in POOLINGS if name != "ep"]
NAMES = {  # parts of published names -> ours
    "cls_token": "query", "query_token": "query", "query_tokens": "query", "latent": "query", "img_queries": "query",
    "pos_embed": "position", "norm_patches": "norm", "wq": "q", "wk": "k", "gamma_1": "scale1", "gamma_2": "scale2",
    "attention_predictor": "score", "self_attn": "attention", "attn": "attention", "xattn": "attention",
    "cross_attn": "attention", "norm1_q": "norm_q", "norm1_k": "norm_k", "norm1_v": "norm_v", "to_q": "q",
    "to_kv": "kv", "to_out": "proj", "gamma": "weight", "beta": "bias",
}  # fmt: skip
CBAM = {"channel.fc1": "channels.0", "channel.fc2": "channels.2"}
CBAM |= {"spatial.conv.conv": "positions.0", "spatial.conv.bn": "positions.1"}
INSIDE = ("dino_block", "blocks_token_only", "cross_attention_block")


class Probe(nn.Module):
    """The head of a probe: pooling, batch norm, classifier."""

    def __init__(self, name: str, setting: dict[str, Any], tokens: int):
        super().__init__()
        dim, side = setting["dim"], round(tokens**0.5)
        options: dict[str, Any] = {"clip": {"grid": (side, side)}}.get(name, {})
        if name == "ep":
            options = {"queries": setting["ep_queries"], "reduction": setting.get("d_out", 1)}
        self.pool = POOLINGS[name](dim, **options)
        self.norm = nn.BatchNorm1d(self.pool.width, eps=1e-6, affine=False)
        self.fc = nn.Linear(self.pool.width, setting["classes"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.pool(x)))


def our_names(name: str, key: str) -> list[str]:
    """The parameters that hold a published one; none if it has no effect, and several if it is packed."""
    parts = [NAMES.get(part, part) for part in key.split(".")]
    top = {"0": "pool", "1": "norm", "2": "fc"}[parts[0]]
    parts = [part for part in parts[1:] if part not in INSIDE]
    if top == "pool":
        if name == "cait" and parts[0] == "0":
            parts = parts[1:]
        if name in ("clip", "siglip") and parts[0] in ("qkv", "q", "kv", "proj"):
            parts.insert(0, "attention")
        if name == "cbam":
            parts = CBAM[".".join(parts[:-1])].split(".") + parts[-1:]
        if name == "dolg":
            parts[0] = {"conv1": "feature", "bn": "norm", "conv2": "score"}[parts[0]]
        if name == "aim":
            parts[0] = {"bn": "norm"}.get(parts[0], parts[0])
        if parts[0] == "norm2_cross":
            return []
    path = ".".join([top, *parts])
    if name != "coca" and (packed := re.search(r"\.(qkv|kv)\.", path)):
        return [path.replace(packed[0], f".{part}.") for part in packed[1]]
    return [path]


def ours(name: str, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state by our keys."""
    state = {}
    for key, tensor in published.items():
        names = our_names(name, key)
        if key.endswith("img_queries"):
            tensor = tensor[None, :1]
        if name == "dolg" and tensor.dim() == 4:
            tensor = tensor[..., 0, 0]
        state.update(zip(names, tensor.chunk(len(names) or 1), strict=False))
    return state


@pytest.mark.parametrize("record_name", RECORDS)
def test_equals_the_record(record_name):
    record = golden.load(f"modules/{record_name}")
    name = record_name.removeprefix("probe_").split("_")[0]
    batch, tokens, dim = record["input_shape"]
    probe = Probe(name, record["setting"], tokens).double().train(record["mode"] == "train")
    loaded = probe.load_state_dict(ours(name, golden.published_state(record)), strict=False)
    assert not loaded.unexpected_keys and all(key.endswith("num_batches_tracked") for key in loaded.missing_keys)
    x: Any = golden.draw("input", (batch, tokens, dim)).requires_grad_()
    side = round(tokens**0.5) if round(tokens**0.5) ** 2 == tokens else 1
    y = probe(x.transpose(1, 2).unflatten(2, (side, -1)))
    assert golden.relative_error(y, record["logits"]) <= 1e-9
    (y * golden.draw("loss", y.shape)).sum().backward()
    assert float(x.grad.norm()) == pytest.approx(record["input_grad_norm"], rel=1e-9)
    for key, norm in record["grad_norms"].items():
        grads = [probe.get_parameter(our).grad for our in our_names(name, key)]
        square = sum(float(grad.square().sum()) for grad in grads if grad is not None)
        assert square**0.5 == pytest.approx(norm, rel=1e-9, abs=1e-12), key


def make(name: str, dim: int = 24, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"grid": (3, 3), **options} if name == "clip" else options
    return POOLINGS[name](dim, **options).double().eval()


@pytest.mark.parametrize("name", POOLINGS)
def test_any_map_and_class_tokens(name):
    pool = make(name, prefix=2) if name == "clip" else make(name)
    prefix = torch.randn(2, 2, 24, dtype=torch.float64)
    for height, width in ((1, 1), (2, 5), (3, 3)):
        x = torch.randn(2, 24, height, width, dtype=torch.float64)
        assert pool(x, prefix).shape == (2, pool.width)
        weights, with_prefix = pool.weights(x, prefix).sum((2, 3)), name not in ("cbam", "dolg")
        assert pool.weights(x, prefix).shape[2:] == (height, width) and weights.shape[0] == 2
        assert bool((weights > 0).all()) and (not with_prefix or bool((weights < 1).all()))
    if name != "clip":
        far = torch.randn(2, 24, 4, 4, dtype=torch.float64)
        assert pool(far).shape == (2, 24) and (name == "cbam" or not torch.allclose(pool(far), pool(far, prefix)))


def test_weights_are_those_of_the_sum():
    """With one-hot values, the pooled vector is the attention itself."""
    pool = make("ep", dim=8, queries=1)
    pool.v.weight.data = torch.eye(8, dtype=torch.float64)
    x = torch.randn(1, 8, 2, 4, dtype=torch.float64)
    weights = pool.weights(x)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(pool(x), (x * weights).sum((2, 3)))


def test_positions_of_clip_are_interpolated_for_another_map():
    pool, x = make("clip"), torch.randn(1, 24, 6, 6, dtype=torch.float64)
    pool.position.data[:] = pool.position.data[:1]  # the same everywhere: so is what is interpolated
    small = make("clip", grid=(6, 6))
    small.load_state_dict({**pool.state_dict(), "position": pool.position.data[:1].expand(37, -1)})
    torch.testing.assert_close(pool(x), small(x))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="queries=5 do not divide the 24 channels"):
        make("ep", queries=5)
    with pytest.raises(ValueError, match="no multiple of reduction=7"):
        make("ep", reduction=7)
    assert make("ep", dim=48).query.shape[1] == 16  # the largest power of two that divides the channels


@pytest.mark.parametrize(
    "name", [n if n in ("ep", "cait") else pytest.param(n, marks=pytest.mark.slow) for n in POOLINGS]
)
def test_exports_with_an_open_batch(name):
    pool, x = make(name), torch.randn(2, 24, 3, 3, dtype=torch.float64)
    program = torch.export.export(pool, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = torch.randn(5, 24, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(program.module()(other), pool(other))
