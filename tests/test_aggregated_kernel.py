"""Aggregated attention on the CPU: reasons, autocast, errors, FLOP count. test_aggregated.py tests the mathematics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tessel.blocks.length_scaled_cosine import LogPositionBias
from tessel.kernels import aggregated_attention, aggregated_attention_unsupported
from tessel.kernels.aggregated import CASES
from tessel.kernels.aggregated.operands import Operands


def inputs(batch=2, size=(5, 6), grid=(2, 3), heads=2, head_dim=8, window=3, dtype=torch.float32):
    bias = LogPositionBias(heads, trained_size=5, hidden=2)(size, grid)
    parameters = {
        "temperature": torch.randn(heads, 1, 1),
        "query_embedding": torch.randn(heads, 1, head_dim),
        "local_bias": torch.randn(heads, window**2),
        "filters": torch.randn(heads, head_dim, window**2),
        "filter_bias": torch.randn(heads, 1, window**2),
    }
    maps = {
        "qkv": torch.randn(batch, *size, 3, heads, head_dim, dtype=dtype),
        "pooled": torch.randn(batch, *grid, 2, heads, head_dim, dtype=dtype),
    }
    return {**maps, "bias": bias, **parameters}


def test_reasons():
    arguments = inputs(head_dim=72, window=5)
    reasons = aggregated_attention_unsupported(arguments["qkv"], arguments["pooled"].double(), window=5)
    assert len(reasons) == 5, "device, dtype, head dim, window and dtype of the pooled map"
    with pytest.raises(RuntimeError, match="cpu.*float32.*head_dim=72 is above 64.*window=5"):
        aggregated_attention(**arguments, backend="triton")


def test_autocast_casts():
    with torch.autocast("cpu", torch.bfloat16):
        assert aggregated_attention(**inputs()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv", lambda x: x[0], r"qkv must be \[B.*\(5, 6, 3, 2, 8\)"),
        ("pooled", lambda x: x[:1], r"pooled must be \[B=2.*\(1, 2, 3, 2, 2, 8\)"),
        ("bias", lambda x: (x[0], x[1].T, x[2]), r"rows of the bias must be \(2, 5\).*\(5, 2\)"),
        ("bias", lambda x: (x[0], x[1], x[2][:1]), r"columns of the bias must be \(3, 6\).*\(1, 6\)"),
        ("bias", lambda x: (x[0][:1], *x[1:]), r"table.*heads=2"),
        ("local_bias", lambda x: x[:, :4], "K=4.*odd"),
        ("local_bias", lambda x: x[:, :8], "K=8.*odd"),
        ("filters", lambda x: x.mT, r"filters must be \(2, 8, 9\).*\(2, 9, 8\)"),
        ("temperature", lambda x: x[0], r"temperature must be \(2, 1, 1\)"),
    ],
)
def test_bad_shapes_are_named(name, change, message):
    arguments = inputs()
    with pytest.raises(ValueError, match=message):
        aggregated_attention(**{**arguments, name: change(arguments[name])})


@settings(deadline=None, max_examples=50)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), data=st.data())
def test_indices_ascend_in_equal_steps(size, data):
    """The kernels rely on this property of the bias tables."""
    grid, *nominal = (tuple(data.draw(st.integers(1, n)) for n in size) for _ in range(3))
    nominal = (nominal[0], tuple(map(min, zip(*nominal, strict=True))))
    position = LogPositionBias(1, trained_size=5, hidden=1)
    for _, *indices in (position(size, grid), position(size, grid, nominal)):
        for index in indices:
            steps = index.diff(dim=1).unique()
            assert len(steps) <= 1 and (steps > 0).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flops_are_counted(case):
    batch, size, grid, heads, head_dim = case
    keys = grid[0] * grid[1]
    shapes = {
        **dict.fromkeys(("query", "key", "value"), (batch, *size, heads, head_dim)),
        **dict.fromkeys(("pooled_key", "pooled_value"), (batch, keys, heads, head_dim)),
        "filters": (heads, 9, batch, *size),
        "local_bias": (heads, 9),
        "table": (heads, 7, 7),
        "rows": (grid[0], size[0]),
        "columns": (grid[1], size[1]),
    }
    operands = Operands(**{name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    with FlopCounterMode(display=False) as counter:
        out, lse = torch.ops.tessel.aggregated_attention(*operands)
        torch.ops.tessel.aggregated_attention_backward(*operands, lse, out)
    product = 2 * batch * size[0] * size[1] * heads * head_dim * (9 + keys)
    assert counter.get_total_flops() == (2 + 5) * product
