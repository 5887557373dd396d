"""Triton kernels in the CPU interpreter against the float64 definition; run by test_kernels.py."""

import pytest
import torch
from interpreter import TOLERANCE, error, opcheck_pair, poisoned_memory  # noqa: F401  (a fixture)

from tessel.kernels import halo_attention, halo_attention_reference

HALO = {  # (B, (H, W), N, D, E, block_size, halo_size, stride)
    "whole blocks": (1, (8, 16), 1, 16, 16, 8, 3, 1),
    "uneven map, two heads, values wider": (1, (9, 3), 2, 8, 24, 8, 3, 1),
    "query stride 2, two images": (2, (5, 4), 1, 8, 16, 4, 1, 2),
    "halo wider than the block": (1, (5, 3), 1, 24, 8, 2, 3, 1),
    "one query in a block": (1, (3, 2), 1, 8, 8, 2, 1, 2),
    "window larger than the map": (1, (2, 3), 1, 48, 32, 8, 4, 1),
    "one row": (1, (1, 9), 1, 32, 48, 4, 1, 1),
    "tiles that end inside a block": (1, (13, 7), 1, 16, 16, 10, 3, 1),
    "window of 18": (1, (3, 2), 1, 64, 64, 2, 8, 1),
    "blocks of 12, query stride 2": (1, (9, 12), 1, 16, 8, 12, 2, 2),
    "no halo": (1, (3, 5), 1, 8, 8, 3, 0, 1),
}
TINY = (1, (2, 1), 1, 8, 8, 2, 1, 1)


def inputs(case, dtype=torch.float64):
    batch, (height, width), heads, head_dim, value_dim, block_size, halo_size, stride = case
    q = torch.randn(batch, -(-height // stride), -(-width // stride), heads, head_dim, dtype=torch.float64)
    kv = torch.randn(batch, height, width, heads, head_dim + value_dim, dtype=torch.float64)
    tables = torch.randn(2, 2 * (block_size + 2 * halo_size) - 1, head_dim, dtype=torch.float64) * head_dim**-0.5
    tensors = [x.to(dtype).requires_grad_() for x in (q, kv, *tables)]
    return tensors, {"block_size": block_size, "halo_size": halo_size, "stride": stride}


def parts(grads, head_dim):
    dq, dkv, height_rel, width_rel = grads
    # Both tables in one comparison: the gradient of one is zero if all keys of a window share a row
    return {"q": dq, "k": dkv[..., :head_dim], "v": dkv[..., head_dim:], "tables": torch.cat((height_rel, width_rel))}


def check(case, dtype, *, mask_border):
    tensors, options = inputs(case, dtype)
    options["mask_border"] = mask_border
    exact = [x.detach().double().requires_grad_() for x in tensors]
    y = halo_attention(*tensors, **options, backend="triton")
    weights = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    got = parts(torch.autograd.grad((y * weights).sum(), tensors), case[3])
    expected = halo_attention_reference(*exact, **options)
    want = parts(torch.autograd.grad((expected * weights.double()).sum(), exact), case[3])
    assert y.dtype == dtype
    errors = {"y": error(y, expected)} | {name: error(got[name], want[name]) for name in want}
    # one by one, because max() ignores NaN
    assert all(one < TOLERANCE[dtype] for one in errors.values()), errors


@pytest.mark.parametrize("case", HALO.values(), ids=HALO)
def test_zero_padding(case):
    check(case, torch.float64, mask_border=False)


MASKED = [name for name in HALO if "block" in name or "window" in name]


@pytest.mark.parametrize("name", MASKED)
def test_masked_border(name):
    check(HALO[name], torch.float64, mask_border=True)


@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCE if dtype != torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "mask_border"),
    [
        ("whole blocks", False),
        ("uneven map, two heads, values wider", True),
        ("query stride 2, two images", False),
    ],
)
def test_low_precision(name, dtype, mask_border):
    check(HALO[name], dtype, mask_border=mask_border)


@pytest.mark.parametrize(
    "reduce",
    [lambda y: y.sum(), lambda y: torch.cat([y, y], -1)[..., 3:11].sum(), lambda y: y.mT.square().sum()],
    ids=["expanded", "part of a cat", "transposed"],
)
def test_gradients_of_any_strides(reduce):
    tensors, options = inputs(HALO["one query in a block"])
    got, want = (
        torch.autograd.grad(reduce(halo_attention(*tensors, **options, backend=backend)), tensors)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_inputs_of_any_strides():
    tensors, options = inputs(HALO["one query in a block"])
    q, kv, *tables = tensors
    want = halo_attention(*tensors, **options, backend="reference")
    strided = q.transpose(1, 3).contiguous().transpose(1, 3), kv.mT.contiguous().mT
    torch.testing.assert_close(halo_attention(*strided, *tables, **options, backend="triton"), want)


def test_gradcheck():
    tensors, options = inputs(TINY)
    call = lambda *x: halo_attention(*x, **options, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    (q, kv, *_), options = inputs(TINY)
    sizes = (*options.values(), False)
    rel = torch.randn(*q.shape[:4], 2, 8, dtype=q.dtype, requires_grad=True)
    opcheck_pair(
        "halo_attention",
        (q, kv, rel, *sizes),
        lambda out, lse: (q, kv, rel, out, lse, torch.randn_like(out), *sizes),
    )


def test_compiles_with_dynamic_sizes():
    compiled = torch.compile(halo_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 3), (3, 2)):
        tensors, options = inputs((1, size, *TINY[2:]))
        got = compiled(*tensors, **options, backend="triton")
        want = halo_attention(*tensors, **options, backend="reference")
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), tensors), torch.autograd.grad(want.square().sum(), tensors)
        )
    torch._dynamo.reset()


def test_no_double_backward():
    tensors, options = inputs(TINY)
    y = halo_attention(*tensors, **options, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_empty_batch():
    tensors, options = inputs((0, *TINY[1:]))
    y = halo_attention(*tensors, **options, backend="triton")
    y.sum().backward()
    assert y.shape == (0, 2, 1, 1, 8) and tensors[1].grad.shape == tensors[1].shape
