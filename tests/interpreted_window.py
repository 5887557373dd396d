"""Triton kernels in the CPU interpreter against the float64 definition; run by test_kernels.py."""

import pytest
import torch
from interpreter import TOLERANCE, error, opcheck_pair, poisoned_memory  # noqa: F401  (a fixture)

from tessel.kernels import window_attention, window_attention_reference

# (B, (H, W), heads, head_dim, windows, with LePE)
LINES = (1, (7, 5), 2, 24, ((7, 1), (1, 5)), True)
STRIPES = (1, (7, 9), 2, 16, ((7, 2), (2, 9)), True)
PACKED = (3, (2, 2), 2, 32, ((2, 2),), False)
LOOP = (1, (10, 13), 1, 16, ((11, 13),), True)
WINDOWS = {
    "lines": LINES,
    "stripes, odd map": STRIPES,
    "two tiles of rows": (1, (14, 9), 2, 24, ((14, 7), (7, 9)), True),
    "square windows, both sides partial": (1, (9, 8), 1, 32, ((7, 7),), False),
    "several images a tile": PACKED,
    "small windows with LePE": (2, (3, 5), 1, 8, ((2, 2),), True),
    "more small windows than a tile has": (2, (9, 10), 1, 8, ((2, 2),), False),
    "single row": (1, (1, 9), 2, 16, ((1, 2), (2, 9)), True),
    "single pixels": (1, (2, 3), 1, 64, ((1, 1),), True),
    "larger than the map": (1, (3, 4), 1, 48, ((9, 7),), True),
    "loop, partial": LOOP,
    "loop, two groups": (1, (11, 12), 2, 32, ((12, 11), (11, 12)), False),
    "loop, long lines beside short ones": (1, (3, 130), 2, 8, ((3, 1), (1, 130)), True),
}


TINY = {
    "one tile": (1, (3, 2), 2, 8, ((3, 1), (1, 2)), True),
    "packed": (2, (2, 3), 1, 8, ((2, 2),), False),
    "loop": (1, (2, 3), 1, 8, ((2, 65),), True),
}


def inputs(case, dtype):
    """qkv and, where the case has them, weight and bias of each group of heads."""
    batch, size, heads, head_dim, windows, lepe = case
    channels = heads * head_dim // len(windows)
    shapes = [(batch, *size, 3, heads, head_dim)] + [(channels, 1, 3, 3), (channels,)] * (len(windows) * lepe)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def attend(op, case, tensors, **options):
    lepe = list(zip(tensors[1::2], tensors[2::2], strict=True)) or None
    return op(tensors[0], windows=case[4], lepe=lepe, **options)


def check(case, dtype, **options):
    tensors = inputs(case, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    y = attend(window_attention, case, tensors, backend="triton", **options)
    expected = attend(window_attention_reference, case, exact, **options)
    weights = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad((y * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert y.dtype == dtype
    found = {"y": error(y, expected)}
    for part, name in enumerate("qkv"):
        # windows of a single pixel: the gradients of q and k are zero except for rounding
        want = wanted[0][:, :, :, part]
        got = grads[0][:, :, :, part]
        found[name] = error(got, want) if want.norm() > 1e-9 else got.double().norm().item() / wanted[0].norm().item()
    for n, (got, want) in enumerate(zip(grads[1:], wanted[1:], strict=True)):
        found[f"{'bias' if n % 2 else 'weight'} {n // 2}"] = error(got, want)
    assert all(value < TOLERANCE[dtype] for value in found.values()), found


@pytest.mark.parametrize("case", WINDOWS.values(), ids=WINDOWS)
def test_window(case):
    check(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [STRIPES, PACKED, LOOP], ids=["stripes", "packed", "loop"])
def test_precision(case, dtype):
    check(case, dtype)


def test_scale():
    check(LINES, torch.float64, scale=-0.7)


@pytest.mark.parametrize("case", [LINES, LOOP], ids=["one tile", "loop"])
def test_large_logits(case):
    """Logits of both signs so large that the softmax picks one key, and a large gradient common to all keys."""
    tensors = [x.detach() for x in inputs(case, torch.bfloat16)]
    tensors[0][:, :, :, :2] *= 8
    tensors[0][:, :, :, 2] += 16
    tensors = [x.requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    got = torch.autograd.grad(attend(window_attention, case, tensors, backend="triton").sum(), tensors[0])[0]
    want = torch.autograd.grad(attend(window_attention_reference, case, exact).sum(), exact[0])[0]
    assert error(got, want) < TOLERANCE[torch.bfloat16]


REDUCTIONS = {
    "expanded": lambda y: y.sum(),
    "cat": lambda y: torch.cat([y, y], -1)[..., 3:11].sum(),
    "strided": lambda y: y.mT.square().sum(),
}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_gradients_of_any_stride(reduce):
    case = TINY["one tile"]
    tensors = inputs(case, torch.float64)
    got, want = (
        torch.autograd.grad(reduce(attend(op, case, tensors, **options)), tensors)
        for op, options in ((window_attention, {"backend": "triton"}), (window_attention_reference, {}))
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_inputs_of_any_stride():
    case = (1, (3, 4), 2, 8, ((3, 1), (1, 4)), True)
    tensors = [x.detach() for x in inputs(case, torch.float64)]
    apart = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    got, want = (attend(window_attention, case, x, backend="triton") for x in (apart, tensors))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_repeats_bitwise():
    tensors = inputs(LINES, torch.bfloat16)
    first, second = (
        torch.autograd.grad(attend(window_attention, LINES, tensors, backend="triton").sum(), tensors) for _ in "ab"
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_empty_batch():
    case = (0, (3, 4), 2, 8, ((3, 1), (1, 4)), True)
    tensors = inputs(case, torch.float64)
    y = attend(window_attention, case, tensors, backend="triton")
    assert y.shape == (0, 3, 4, 2, 8)
    assert all(not grad.any() for grad in torch.autograd.grad(y.sum(), tensors))


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_gradcheck(case):
    def call(*tensors):
        return attend(window_attention, case, tensors, backend="triton")

    assert torch.autograd.gradcheck(call, inputs(case, torch.float64), fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_opcheck(case):
    qkv, *lepe = inputs(case, torch.float64)
    sides, scale = [side for window in case[4] for side in window], 0.3
    opcheck_pair(
        "window_attention",
        (qkv, lepe, sides, scale),
        lambda out, lse: (qkv, lepe, lse, torch.randn_like(out), sides, scale),
    )


def test_compiles_with_dynamic_sizes():
    def call(*tensors):
        _, height, width = tensors[0].shape[:3]
        case = (None, None, None, None, ((height, 1), (1, width)))
        return attend(window_attention, case, tensors, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((4, 3), (3, 5)):
        tensors = inputs((1, size, 2, 8, ((1, 1), (1, 1)), True), torch.float64)
        got, want = (torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, call))
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_no_double_backward():
    tensors = inputs(TINY["one tile"], torch.float64)
    y = attend(window_attention, TINY["one tile"], tensors, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
