"""Triton kernels in the CPU interpreter against the float64 definition; run by test_kernels.py."""

import pytest
import torch
from interpreter import TOLERANCE, error, opcheck_pair, poisoned_memory  # noqa: F401  (a fixture)

from tessel.kernels import neighborhood_attention, neighborhood_attention_reference

NEIGHBORHOOD = {  # (B, (H, W), N, D, K, dilation)
    "one tile": (1, (7, 8), 2, 16, 5, 1),
    "two tiles, two images": (2, (3, 11), 1, 8, 3, 1),
    "window of the whole map": (1, (7, 7), 1, 24, 7, 1),
    "classes of unequal size": (1, (7, 6), 1, 8, 3, 2),
    "tile behind the end of a short class": (1, (17, 2), 1, 8, 1, 2),
    "tiles that end inside a class": (1, (10, 13), 1, 32, 5, 1),
    "one key": (1, (2, 3), 2, 8, 1, 1),
}
TINY = (1, (4, 3), 1, 8, 3, 1)


def inputs(case, dtype=torch.float64):
    batch, (height, width), heads, head_dim, kernel, dilation = case
    qkv = torch.randn(batch, height, width, 3, heads, head_dim, dtype=torch.float64)
    bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (qkv, bias)], {"dilation": dilation}


def parts(grads):
    dqkv, dbias = grads
    return {**dict(zip("qkv", dqkv.unbind(3), strict=True)), "bias": dbias}


CHECKS = [(name, torch.float64) for name in NEIGHBORHOOD]
CHECKS += [(name, dtype) for name in ("one tile", "classes of unequal size") for dtype in TOLERANCE]


@pytest.mark.parametrize(("name", "dtype"), dict.fromkeys(CHECKS), ids=str)
def test_outputs_and_gradients(name, dtype):
    tensors, options = inputs(NEIGHBORHOOD[name], dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    y = neighborhood_attention(*tensors, **options, backend="triton")
    weights = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    got = parts(torch.autograd.grad((y * weights).sum(), tensors))
    expected = neighborhood_attention_reference(*exact, **options)
    want = parts(torch.autograd.grad((expected * weights.double()).sum(), exact))
    assert y.dtype == dtype
    if NEIGHBORHOOD[name][4] == 1:  # the softmax of one key is 1, whatever its logit is
        got, want = {"v": got["v"]}, {"v": want["v"]}
    errors = {"y": error(y, expected)} | {part: error(got[part], want[part]) for part in want}
    # one by one, because max() ignores NaN
    assert all(one < TOLERANCE[dtype] for one in errors.values()), errors


def test_strides_of_inputs_and_gradients():
    tensors, options = inputs(TINY)
    qkv, bias = tensors
    strided = qkv.transpose(1, 4).contiguous().transpose(1, 4), bias.mT.contiguous().mT
    for reduce in (lambda y: y.sum(), lambda y: torch.cat([y, y], -1)[..., 3:11].sum(), lambda y: y.mT.square().sum()):
        got, want = (
            torch.autograd.grad(reduce(neighborhood_attention(*x, **options, backend=backend)), tensors)
            for x, backend in ((strided, "triton"), (tensors, "reference"))
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    tensors, options = inputs(TINY)
    call = lambda *x: neighborhood_attention(*x, **options, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    (qkv, bias), _ = inputs(TINY)
    opcheck_pair(
        "neighborhood_attention",
        (qkv, bias, 1),
        lambda out, lse: (qkv, bias, out, lse, torch.randn_like(out), 1),
    )


def test_compiles_with_dynamic_sizes():
    compiled = torch.compile(neighborhood_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((4, 3), (3, 5)):
        tensors, options = inputs((1, size, *TINY[2:]))
        got = compiled(*tensors, **options, backend="triton")
        want = neighborhood_attention(*tensors, **options, backend="reference")
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), tensors), torch.autograd.grad(want.square().sum(), tensors)
        )
    torch._dynamo.reset()


def test_no_double_backward():
    tensors, options = inputs(TINY)
    y = neighborhood_attention(*tensors, **options, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_empty_batch():
    tensors, options = inputs((0, *TINY[1:]))
    y = neighborhood_attention(*tensors, **options, backend="triton")
    y.sum().backward()
    assert y.shape == (0, 4, 3, 1, 8) and tensors[0].grad.shape == tensors[0].shape
