"""Triton kernels in the CPU interpreter against the float64 definition; run by test_kernels.py."""

import pytest
import torch
from interpreter import TOLERANCE, error, opcheck_pair, poisoned_memory  # noqa: F401  (a fixture)

from tessel.kernels import routed_attention, routed_attention_reference

ROUTED = {  # (B, (H, W), grid, heads, head_dim, topk)
    "regions of one tile": (1, (16, 16), (2, 2), 2, 32, 1),
    "uneven regions, width 24": (1, (12, 8), (3, 2), 1, 24, 2),
    "tiny regions, many routed regions": (1, (6, 6), (3, 3), 1, 8, 9),
    "partial tiles, two images": (2, (18, 10), (2, 1), 1, 16, 2),
    "single pixels": (1, (2, 3), (2, 3), 1, 64, 4),
}


def routed_case(case, dtype, select):
    batch, size, grid, heads, head_dim, topk = case
    regions = grid[0] * grid[1]
    qkv = torch.randn(batch, *size, 3, heads, head_dim, dtype=torch.float64).to(dtype).requires_grad_()
    chosen = torch.rand(batch, regions, regions).topk(topk).indices
    index = torch.arange(topk).expand(batch, regions, topk) if select == "the same" else chosen
    return qkv, index, {"grid": grid, "scale": 0.3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("select", ["at random", "the same"])
@pytest.mark.parametrize("case", ROUTED.values(), ids=ROUTED)
def test_routed(case, select, dtype):
    qkv, index, options = routed_case(case, dtype, select)
    exact = qkv.detach().double().requires_grad_()
    y = routed_attention(qkv, index, **options, backend="triton")
    weights = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    (grad,) = torch.autograd.grad((y * weights).sum(), qkv)
    expected = routed_attention_reference(exact, index, **options)
    (expected_grad,) = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert error(y, expected) < TOLERANCE[dtype]
    for part, name in enumerate("qkv"):
        assert error(grad[:, :, :, part], expected_grad[:, :, :, part]) < TOLERANCE[dtype], name


def test_routed_takes_expanded_gradients():
    qkv, index, options = routed_case(ROUTED["uneven regions, width 24"], torch.float64, "at random")
    got, want = (
        torch.autograd.grad(routed_attention(qkv, index, **options, backend=backend).sum(), qkv)[0]
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


TINY = (1, (2, 4), (1, 2), 1, 8, 2)


def test_gradcheck():
    qkv, index, options = routed_case(TINY, torch.float64, "at random")
    call = lambda x: routed_attention(x, index, **options, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(call, (qkv,), fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    qkv, index, options = routed_case(TINY, torch.float64, "at random")
    settings = (list(options["grid"]), options["scale"], True)
    opcheck_pair(
        "routed_attention",
        (qkv, index, *settings),
        lambda out, lse: (qkv, index, out, lse, torch.randn_like(out), *settings),
    )
