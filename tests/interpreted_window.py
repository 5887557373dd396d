"""Triton kernels in the CPU interpreter against the float64 definition; run by test_kernels.py."""

from functools import partial

import pytest
import torch
from interpreter import TOLERANCE, error, opcheck_pair, poisoned_memory  # noqa: F401  (a fixture)

from tessel.blocks import LongShortDistance, ShiftedWindow
from tessel.kernels import dispatch, window_attention, window_attention_reference
from tessel.kernels.window import triton
from tessel.kernels.window.tiles import Case

# (B, (H, W), heads, head_dim, windows, with LePE), then as in window.tiles.Case: bias, stride, start
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
SHIFTED = (1, (4, 6), 2, 16, ((3, 3),), False, "table", 1, 1)
LONG = (2, (5, 6), 1, 8, ((2, 2),), False, "dense", 2, 0)
BIASED_LOOP = (1, (9, 13), 1, 8, ((11, 12),), False, "table", 1, 2)
PLACED = {
    "shifted windows": SHIFTED,
    "long distance, windows of padding only": LONG,
    "wide windows": (1, (4, 5), 1, 8, ((2, 3),), False, "dense", 1, 1),
    "padding belongs to the keys": (1, (5, 4), 2, 8, ((3, 2),), False, "table", 2, None),
    "two tiles of rows": (1, (9, 12), 1, 8, ((9, 11),), False, "dense", 1, 0),
    "loop whose first keys lie outside of the map": BIASED_LOOP,
    "a start alone": (1, (3, 7), 1, 8, ((2, 6),), False, "none", 1, 1),
    "more windows than a program of the bias has": (2, (4, 9), 1, 8, ((2, 1),), False, "table", 1, 0),
}


TINY = {
    "one tile": (1, (3, 2), 2, 8, ((3, 1), (1, 2)), True),
    "packed": (2, (2, 3), 1, 8, ((2, 2),), False),
    "loop": (1, (2, 3), 1, 8, ((2, 65),), True),
    "bias": (1, (3, 2), 1, 8, ((2, 2),), False, "table", 1, 1),
    "bias, loop": (1, (2, 2), 1, 8, ((2, 65),), False, "dense", 1, 0),
}


def inputs(case, dtype):
    """qkv and, where the case has them, weight and bias of each group of heads, or the bias, in at least float32."""
    batch, size, heads, head_dim, windows, lepe, bias, *_ = Case(*case)
    channels = heads * head_dim // len(windows)
    shapes = [(batch, *size, 3, heads, head_dim)] + [(channels, 1, 3, 3), (channels,)] * (len(windows) * lepe)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    if bias != "none":
        h, w = windows[0]
        shape = (heads, h * w, h * w) if bias == "dense" else (heads, 2 * h - 1, 2 * w - 1)
        tensors.append(torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_())
    return tensors


def attend(op, case, tensors, **options):
    case = Case(*case)
    options |= {"stride": case.stride, "start": case.start}
    if case.bias != "none":
        return op(tensors[0], windows=case.windows, bias=tensors[1], **options)
    lepe = list(zip(tensors[1::2], tensors[2::2], strict=True)) or None
    return op(tensors[0], windows=case.windows, lepe=lepe, **options)


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
        assert got.dtype == tensors[1 + n].dtype
        found[f"{'bias' if n % 2 else 'weight'} {n // 2}"] = error(got, want)
    assert all(value < TOLERANCE[dtype] for value in found.values()), found


@pytest.mark.parametrize("case", (WINDOWS | PLACED).values(), ids=WINDOWS | PLACED)
def test_window(case):
    check(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [STRIPES, PACKED, LOOP, SHIFTED], ids=["stripes", "packed", "loop", "shifted with a bias"]
)
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


@pytest.mark.parametrize("case", [LINES, SHIFTED, LONG], ids=["stripes", "shifted", "long distance"])
def test_repeats_bitwise(case):
    tensors = inputs(case, torch.bfloat16)
    first, *others = (
        torch.autograd.grad(attend(window_attention, case, tensors, backend="triton").sum(), tensors) for _ in "abc"
    )
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=0)


def test_the_bias_is_as_exact_in_any_number_of_parts(monkeypatch):
    """Programs that own more windows store fewer sums."""
    case = PLACED["more windows than a program of the bias has"]
    tensors = inputs(case, torch.float64)

    def gradient():
        return torch.autograd.grad(attend(window_attention, case, tensors, backend="triton").sum(), tensors[1])[0]

    want = gradient()
    monkeypatch.setattr("tessel.kernels.window.triton.RUN", 5)
    torch.testing.assert_close(gradient(), want, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("tessel.kernels.window.triton.MAX_PARTIAL_BYTES", 1)
    torch.testing.assert_close(gradient(), want, rtol=1e-12, atol=1e-12)


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
    case = Case(*case)
    sizes = [side for window in case.windows for side in window], case.stride, -1 if case.start is None else 0, 0.3
    bias = None if case.bias == "none" else lepe.pop()
    opcheck_pair(
        "window_attention",
        (qkv, lepe, bias, *sizes),
        lambda out, lse: (qkv, lepe, bias, lse, torch.randn_like(out), *sizes),
    )


def test_compiles_with_dynamic_sizes():
    def call(*tensors):
        _, height, width = tensors[0].shape[:3]
        case = (None, None, None, None, ((height, 1), (1, width)), True)
        return attend(window_attention, case, tensors, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((4, 3), (3, 5)):
        tensors = inputs((1, size, 2, 8, ((1, 1), (1, 1)), True), torch.float64)
        got, want = (torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, call))
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_the_bias_compiles_with_dynamic_sizes():
    def call(*tensors):
        return attend(window_attention, SHIFTED, tensors, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((4, 3), (3, 5)):
        tensors = inputs((1, size, *SHIFTED[2:]), torch.float64)
        got, want = (torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, call))
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


BLOCKS = {
    "shifted": (partial(ShiftedWindow, window=2, shift=1), (3, 4)),
    "long distance": (partial(LongShortDistance, group=2, interval=2), (3, 5)),
}


@pytest.mark.parametrize(("make", "size"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_take_the_kernels(monkeypatch, make, size):
    block = make(16, num_heads=1).double()
    x = torch.randn(1, 16, *size, dtype=torch.float64, requires_grad=True)
    tensors = [x, *block.parameters()]

    def value_and_gradients(block):
        y = block(x)
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    want = value_and_gradients(block)
    calls, forward = [], triton.forward
    monkeypatch.setattr(triton, "forward", lambda *args: calls.append(args) or forward(*args))
    monkeypatch.setattr(dispatch, "default_backend", "triton")
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        calls.clear()
        torch.testing.assert_close(value_and_gradients(run), want, rtol=1e-9, atol=1e-9)
        assert calls
    torch._dynamo.reset()


def test_no_double_backward():
    tensors = inputs(TINY["one tile"], torch.float64)
    y = attend(window_attention, TINY["one tile"], tensors, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
