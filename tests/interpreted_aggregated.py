"""Triton kernels in the CPU interpreter against the float64 definition; run by test_kernels.py."""

import pytest
import torch
from interpreter import TOLERANCE, error, opcheck_pair, poisoned_memory  # noqa: F401  (a fixture)

from tessel.blocks.length_scaled_cosine import LogPositionBias
from tessel.kernels import aggregated_attention, aggregated_attention_reference
from tessel.kernels.aggregated import triton as launches
from tessel.kernels.aggregated.operands import Operands

AGGREGATED = {  # (B, (H, W), (rows, columns), N, D, nominal)
    "even map": (1, (6, 6), (3, 3), 1, 24, None),
    "odd map, bins of two sizes, two images": (2, (5, 7), (2, 3), 1, 16, None),
    "two heads, bins of one size in rows only": (1, (6, 5), (3, 2), 2, 8, None),
    "one row": (1, (1, 9), (1, 4), 1, 32, None),
    "one pixel, one key": (1, (1, 1), (1, 1), 1, 8, None),
    "one column": (1, (4, 1), (2, 1), 1, 48, None),
    "more keys than a tile": (1, (6, 11), (6, 11), 1, 64, None),
    "resized bias": (1, (4, 5), (2, 2), 1, 16, ((6, 3), (3, 1))),
}
TINY = (1, (2, 3), (1, 2), 1, 8, None)
PARAMETERS = ("temperature", "query_embedding", "local_bias", "filters", "filter_bias")
NAMES = ("qkv", "pooled", "table", *PARAMETERS)


def inputs(case, dtype=torch.float64):
    """Tensors in the order of NAMES, and the two indices of the bias."""
    batch, size, grid, heads, head_dim, nominal = case
    table, rows, columns = LogPositionBias(heads, trained_size=5, hidden=2)(size, grid, nominal)
    shapes = (
        (batch, *size, 3, heads, head_dim),
        (batch, *grid, 2, heads, head_dim),
        table.shape,
        (heads, 1, 1),
        (heads, 1, head_dim),
        (heads, 9),
        (heads, head_dim, 9),
        (heads, 1, 9),
    )
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[4] *= head_dim**-0.5  # about the length of the normalized query that it is added to
    return [x.to(dtype).requires_grad_() for x in tensors], (rows, columns)


def call(op, tensors, indices, **options):
    qkv, pooled, table, *parameters = tensors
    return op(qkv, pooled, (table, *indices), **dict(zip(PARAMETERS, parameters, strict=True)), **options)


def errors(case, dtype):
    tensors, indices = inputs(case, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    y = call(aggregated_attention, tensors, indices, backend="triton")
    weights = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    got = parts(torch.autograd.grad((y * weights).sum(), tensors))
    expected = call(aggregated_attention_reference, exact, indices)
    want = parts(torch.autograd.grad((expected * weights.double()).sum(), exact))
    assert y.dtype == dtype
    return {"y": error(y, expected)} | {name: error(got[name], want[name]) for name in want}


def parts(grads):
    qkv, pooled, table, temperature, embedding, *window = grads
    # Both in one comparison: the gradient of the temperature is a single sum over all pixels, which may cancel
    query = torch.cat((temperature, embedding), 2)
    named = {"table": table, "query": query} | dict(zip(PARAMETERS[2:], window, strict=True))
    maps = {"qkv"[i]: qkv[:, :, :, i] for i in range(3)} | {f"pooled {'kv'[i]}": pooled[:, :, :, i] for i in range(2)}
    return maps | named


@pytest.mark.parametrize("case", AGGREGATED.values(), ids=AGGREGATED)
def test_aggregated(case):
    found = errors(case, torch.float64)
    assert all(value < TOLERANCE[torch.float64] for value in found.values()), found


@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCE if dtype != torch.float64], ids=str)
@pytest.mark.parametrize("name", ["odd map, bins of two sizes, two images", "more keys than a tile"])
def test_low_precision(name, dtype):
    found = errors(AGGREGATED[name], dtype)
    assert all(value < TOLERANCE[dtype] for value in found.values()), found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradient_of_the_temperature(dtype):
    """On its own, with weights that prevent cancellation: the derivative of y with respect to the temperature."""
    tensors, indices = inputs(TINY, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    hotter, colder = ([x + step if i == 3 else x for i, x in enumerate(exact)] for step in (1e-3, -1e-3))
    with torch.no_grad():
        weights = call(aggregated_attention_reference, hotter, indices)
        weights -= call(aggregated_attention_reference, colder, indices)
        weights = (weights / weights.abs().max()).to(dtype)
    y = call(aggregated_attention, tensors, indices, backend="triton")
    expected = call(aggregated_attention_reference, exact, indices)
    (got,) = torch.autograd.grad((y * weights).sum(), tensors[3])
    (want,) = torch.autograd.grad((expected * weights.double()).sum(), exact[3])
    assert error(got, want) < TOLERANCE[dtype]


def value_and_grads(op, tensors, indices, **options):
    y = call(op, tensors, indices, **options)
    return y, *torch.autograd.grad(y.sin().sum(), tensors)


def test_split_sums_and_small_buffers_give_the_same_gradients(monkeypatch):
    tensors, indices = inputs((3, (5, 7), (3, 2), 1, 8, None))
    want = value_and_grads(aggregated_attention_reference, tensors, indices)
    for programs, memory in ((4, 1), (1, 2000)):
        monkeypatch.setattr(launches, "PROGRAMS", programs)
        monkeypatch.setattr(launches, "PAIR_BYTES", memory)
        got = value_and_grads(aggregated_attention, tensors, indices, backend="triton")
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "reduce",
    [lambda y: y.sum(), lambda y: torch.cat([y, y], -1)[..., 3:11].sum(), lambda y: y.mT.square().sum()],
    ids=["expanded", "part of a cat", "transposed"],
)
def test_gradients_of_any_strides(reduce):
    tensors, indices = inputs(TINY)
    got, want = (
        torch.autograd.grad(reduce(call(aggregated_attention, tensors, indices, backend=backend)), tensors)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_inputs_of_any_strides():
    tensors, indices = inputs(TINY)
    want = call(aggregated_attention, tensors, indices, backend="reference")
    strided = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in tensors]
    torch.testing.assert_close(call(aggregated_attention, strided, indices, backend="triton"), want)


def test_gradcheck():
    tensors, indices = inputs(TINY)
    triton = lambda *x: call(aggregated_attention, x, indices, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(triton, tensors, fast_mode=True)


def operands() -> Operands:
    batch, size, grid, heads, head_dim, _ = TINY
    (qkv, pooled, table, *_), (rows, columns) = inputs(TINY)
    q, k, v = qkv.detach().unbind(3)
    pooled_key, pooled_value = pooled.detach().flatten(1, 2).unbind(2)
    filters, local_bias = torch.randn(heads, 9, batch, *size).double(), torch.randn(heads, 9).double()
    floating = (q, k, v, filters, pooled_key, pooled_value, local_bias, table.detach())
    return Operands(*(x.clone().requires_grad_() for x in floating), rows, columns)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    inputs = operands()
    opcheck_pair("aggregated_attention", inputs, lambda out, lse: (*inputs, lse, torch.randn_like(out)))


def test_compiles_with_dynamic_sizes():
    compiled = torch.compile(aggregated_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 3), (3, 2)):
        tensors, indices = inputs((1, size, (2, 2), 1, 8, None))
        got = value_and_grads(compiled, tensors, indices, backend="triton")
        want = value_and_grads(aggregated_attention_reference, tensors, indices)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch._dynamo.reset()


def test_no_double_backward():
    tensors, indices = inputs(TINY)
    y = call(aggregated_attention, tensors, indices, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_empty_batch():
    tensors, indices = inputs((0, *TINY[1:]))
    y, *grads = value_and_grads(aggregated_attention, tensors, indices, backend="triton")
    assert y.shape == (0, 2, 3, 1, 8)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, tensors, strict=True))
