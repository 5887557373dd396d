"""Flow attention against a loop over heads, queries and keys, and the keys of the released file."""

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tessel.zoo
from tessel.blocks import Flow


def by_loops(mixer: Flow, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, with every pair of tokens one by one."""
    dim, height, width = x.shape
    tokens, eps = x.flatten(1).T, mixer.eps
    q, k, v = mixer.qkv(tokens).chunk(3, -1)
    y = torch.zeros_like(tokens)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return ((a + eps) * (b + eps)).sum() + eps

    for c in torch.arange(dim).chunk(mixer.num_heads):
        sinks, sources = q[:, c].sigmoid(), k[:, c].sigmoid()
        inflow = [1 / dot(sink, sources.sum(0)) for sink in sinks]
        outflow = [1 / dot(source, sinks.sum(0)) for source in sources]
        given_out = sum(source * flow for source, flow in zip(sources, outflow, strict=True))
        taken_in = sum(sink * flow for sink, flow in zip(sinks, inflow, strict=True))
        competition = torch.stack([dot(source, taken_in).clamp(-1, 1) for source in sources]).softmax(0) * len(tokens)
        for i, sink in enumerate(sinks):
            mixed = sum(
                (sink @ source) * w * value for source, w, value in zip(sources, competition, v[:, c], strict=True)
            )
            y[i, c] = dot(sink, given_out).sigmoid() * inflow[i] * mixed
    return mixer.proj(y).T.unflatten(1, (height, width))


@settings(max_examples=15)
@given(height=st.integers(1, 4), width=st.integers(1, 4), heads=st.sampled_from([1, 2, 3]), size=st.integers(1, 3))
def test_equals_the_loop(height, width, heads, size):
    torch.manual_seed(0)
    mixer = Flow(size * heads, num_heads=heads).double()
    x = 3 * torch.randn(2, size * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 3)], ids=str)
def test_gradcheck(size):
    mixer = Flow(4, num_heads=2).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize("heads", [0, 3])
def test_constructor_errors(heads):
    with pytest.raises(ValueError, match=f"dim=8.*num_heads={heads}"):
        Flow(8, num_heads=heads)


def test_counters_of_operations_in_the_released_file_are_dropped():
    record = golden.load("flowformer_cv")
    state = {key: torch.empty(shape, device="meta") for key, shape in record["state"]}
    modules = {"", *(key.rpartition(".")[0][:end] for key in state for end in [None, *dots(key)])}
    counters = {
        f"{module}.{leaf}".lstrip("."): torch.zeros(1) for module in modules for leaf in ("total_ops", "total_params")
    }
    assert "blocks.0.1.attn.qkv.total_ops" in counters
    converted = tessel.zoo.from_published("flowformer_cv", {**state, **counters})
    assert converted.keys() == tessel.zoo.from_published("flowformer_cv", state).keys()


def dots(key: str) -> list[int]:
    return [i for i, letter in enumerate(key) if letter == "."]
