"""Window attention on the CPU: the definition against a loop over pixels, reasons, errors, autocast, FLOP count."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from tessel.kernels import window_attention, window_attention_reference, window_attention_unsupported
from tessel.kernels.window.position import bias_gradient, dense_bias


def window_inputs(batch=1, size=(4, 6), heads=2, head_dim=8, windows=((4, 2), (2, 6)), lepe=True, dtype=torch.float64):
    channels = heads * head_dim // len(windows)
    qkv = torch.randn(batch, *size, 3, heads, head_dim, dtype=dtype)
    pairs = [(torch.randn(channels, 1, 3, 3, dtype=dtype), torch.randn(channels, dtype=dtype)) for _ in windows]
    return qkv, {"windows": windows, "lepe": pairs if lepe else None}


def by_loops(qkv, windows, lepe, scale):
    """Window by window and tap by tap, with zeros at positions outside the map or the window."""
    batch, height, width, _, heads, head_dim = qkv.shape
    out = torch.zeros(batch, height, width, heads, head_dim, dtype=qkv.dtype)
    for n in range(heads):
        group, place = divmod(n, heads // len(windows))
        win_h, win_w = windows[group]
        channels = slice(place * head_dim, (place + 1) * head_dim)
        for top in range(-((-height % win_h) // 2), height, win_h):
            for left in range(-((-width % win_w) // 2), width, win_w):
                pixels = [(r, c) for r in range(top, top + win_h) for c in range(left, left + win_w)]
                inside = [0 <= r < height and 0 <= c < width for r, c in pixels]
                zero = torch.zeros(batch, 3, head_dim, dtype=qkv.dtype)
                q, k, v = torch.stack(
                    [
                        qkv[:, r, c, :, n] if is_inside else zero
                        for (r, c), is_inside in zip(pixels, inside, strict=True)
                    ],
                    1,
                ).unbind(2)
                y = (scale * q @ k.mT).softmax(-1) @ v
                values = dict(zip(pixels, v.unbind(1), strict=True))
                for i, (r, c) in enumerate(pixels):
                    if not inside[i]:
                        continue
                    out[:, r, c, n] = y[:, i]
                    if lepe is not None:
                        weight, bias = (t[channels] for t in lepe[group])
                        taps = [(dr, dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if (r + dr, c + dc) in values]
                        local = [weight[:, 0, dr + 1, dc + 1] * values[r + dr, c + dc] for dr, dc in taps]
                        out[:, r, c, n] += bias + torch.stack(local).sum(0)
    return out


def placed_by_loops(qkv, window, bias, stride, start):
    """Pixel by pixel. Without `start` pixels outside of the map are keys of value 0, else they are no keys."""
    batch, height, width, _, heads, head_dim = qkv.shape
    first = [
        start if start is not None else -((-side % (n * stride)) // 2)
        for side, n in zip((height, width), window, strict=True)
    ]
    pairs = range(window[0] * window[1])
    out = torch.zeros(batch, height, width, heads, head_dim, dtype=qkv.dtype)
    zero = torch.zeros(batch, heads, head_dim, dtype=qkv.dtype)

    def place(pixel):
        """The window of a pixel, and its row and column there."""
        found = []
        for p, n, origin in zip(pixel, window, first, strict=True):
            part, rest = divmod(p - origin, n * stride)
            found.append(((part, rest % stride), rest // stride))
        return tuple(f[0] for f in found), [f[1] for f in found]

    for pixel in itertools.product(range(height), range(width)):
        of_window, (row, column) = place(pixel)
        logits, values = [], []
        for pair in pairs:
            key = [pixel[0] + (pair // window[1] - row) * stride, pixel[1] + (pair % window[1] - column) * stride]
            assert place(key)[0] == of_window
            inside = 0 <= key[0] < height and 0 <= key[1] < width
            if not inside and start is not None:
                continue
            k, v = (qkv[:, key[0], key[1], part] if inside else zero for part in (1, 2))
            logit = (qkv[:, pixel[0], pixel[1], 0] * k).sum(-1) / head_dim**0.5
            if bias is not None and bias.shape[1] == len(pairs):
                logit = logit + bias[:, row * window[1] + column, pair]
            elif bias is not None:
                dy, dx = row - pair // window[1], column - pair % window[1]
                logit = logit + bias[:, dy + window[0] - 1, dx + window[1] - 1]
            logits.append(logit)
            values.append(v)
        weights = torch.stack(logits, -1).softmax(-1)
        out[:, pixel[0], pixel[1]] = (weights[..., None] * torch.stack(values, 2)).sum(2)
    return out


SIDES = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 2), size=SIDES, windows=st.lists(SIDES, min_size=1, max_size=3), lepe=st.booleans())
def test_reference_equals_the_loop(batch, size, windows, lepe):
    torch.manual_seed(0)
    qkv, options = window_inputs(batch, size, 2 * len(windows), 3, windows, lepe)
    y = window_attention_reference(qkv, **options, scale=0.7)
    torch.testing.assert_close(y, by_loops(qkv, **options, scale=0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lepe", [False, True])
def test_none_is_the_whole_side(lepe):
    sides, named = ((None, 2), (3, None), (None, None)), ((5, 2), (3, 7), (5, 7))
    qkv, options = window_inputs(2, (5, 7), 6, 3, named, lepe)
    expected = window_attention_reference(qkv, **options)
    y = window_attention(qkv, **{**options, "windows": sides})
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def placed_inputs(size, window, kind, *, heads=2, head_dim=3):
    """qkv and a bias in float64; kind: table or dense."""
    qkv = torch.randn(1, *size, 3, heads, head_dim, dtype=torch.float64, requires_grad=True)
    pixels = window[0] * window[1]
    shape = (pixels, pixels) if kind == "dense" else (2 * window[0] - 1, 2 * window[1] - 1)
    return qkv, torch.randn(heads, *shape, dtype=torch.float64, requires_grad=True)


@settings(deadline=None, max_examples=15)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kind=st.sampled_from(["none", "table", "dense"]),
    stride=st.integers(1, 3),
    start=st.none() | st.integers(0, 8),
)
@example(size=(6, 6), window=(3, 3), kind="table", stride=1, start=1)
@example(size=(5, 7), window=(2, 2), kind="dense", stride=2, start=0)
def test_strides_starts_and_biases_equal_the_loop(size, window, kind, stride, start):
    torch.manual_seed(0)
    start = None if start is None else start % (min(window) * stride)
    tensors = placed_inputs(size, window, kind)[: 1 if kind == "none" else 2]
    qkv, bias = tensors[0], None if kind == "none" else tensors[1]
    y = window_attention(qkv, windows=(window,), bias=bias, stride=stride, start=start)
    expected = placed_by_loops(qkv, window, bias, stride, start)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    got, want = (torch.autograd.grad(x.square().sum(), tensors) for x in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kind", "stride", "start"), [("table", 1, 1), ("dense", 2, 0), ("table", 2, None)])
def test_gradcheck_of_the_bias(kind, stride, start):
    tensors = placed_inputs((3, 5), (2, 3), kind)

    def call(qkv, bias):
        return window_attention(qkv, windows=((2, 3),), bias=bias, stride=stride, start=start)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_gradients_of_a_table_from_those_of_the_dense_bias():
    """The kernels sum diagonals, autograd adds the entries one by one."""
    for window in ((1, 1), (1, 4), (3, 2)):
        _, table = placed_inputs((1, 1), window, "table")
        dense = dense_bias(table, window)
        gradient = torch.randn_like(dense)
        (want,) = torch.autograd.grad(dense, table, gradient)
        torch.testing.assert_close(bias_gradient(gradient.contiguous(), window, table), want)


def test_gradients_per_image_by_vmap():
    _, bias = placed_inputs((3, 5), (2, 2), "table")
    qkv = torch.randn(2, 3, 5, 3, 2, 3, dtype=torch.float64)

    def loss(bias, qkv):
        return window_attention(qkv[None], windows=((2, 2),), bias=bias, start=1).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(bias.detach(), qkv)
    want = torch.stack([torch.autograd.grad(loss(bias, image), bias)[0] for image in qkv])
    torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_compiles_with_dynamic_sizes():
    def call(qkv, bias):
        return window_attention(qkv, windows=((2, 2),), bias=bias, start=1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((9, 13), (4, 6)):
        tensors = placed_inputs(size, (2, 2), "table")
        got, want = (torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, call))
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_scale_defaults_to_the_head_dim():
    qkv, options = window_inputs()
    torch.testing.assert_close(window_attention(qkv, **options), window_attention(qkv, **options, scale=8**-0.5))


def test_empty_batch():
    qkv, options = window_inputs(batch=0, windows=((4, 1), (3, 4)))
    assert window_attention(qkv, **options).shape == (0, 4, 6, 2, 8)


def test_autocast_casts():
    qkv, options = window_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert window_attention(qkv, **options).dtype == torch.bfloat16
        bias = torch.randn(2, 3, 3, requires_grad=True)  # a parameter in float32
        y = window_attention(qkv, windows=((2, 2),), bias=bias, start=1)
        assert y.dtype == torch.bfloat16
        assert torch.autograd.grad(y.sum(), bias)[0].dtype == torch.float32


def test_flops_are_counted():
    pytest.importorskip("triton")
    qkv, options = window_inputs()
    product, taps = 2 * 24 * 8 * (8 + 12), 2 * 9 * 24 * 16
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        lepe, sizes = [t.to("meta") for pair in options["lepe"] for t in pair], ([4, 2, 2, 6], 1, -1, 1.0)
        out, lse = torch.ops.tessel.window_attention(qkv.to("meta"), lepe, None, *sizes)
        assert lse.numel() == 0, "windows of one tile save no lse"
        forward = counter.get_total_flops()
        backward = torch.ops.tessel.window_attention_backward
        grads, dlepe = backward(qkv.to("meta"), lepe, None, lse, out, *sizes)
    assert forward == 2 * product + taps
    assert counter.get_total_flops() - forward == 5 * product + 2 * taps
    assert grads.shape == qkv.shape and [g.shape for g in dlepe] == [t.shape for t in lepe]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(1, 2, 2, 8)}, r"\(1, 2, 2, 8\)"),
        ({"windows": ((2, 2),) * 3}, "heads=2.*3 windows"),
        ({"windows": ()}, "heads=2.*0 windows"),
        ({"windows": ((2, 0), (2, 2))}, r"window=\(2, 0\)"),
        ({"windows": ((2, 2, 2), (2, 2))}, r"window=\(2, 2, 2\)"),
        ({"windows": ((2, 2),)}, "lepe has 2 entries for 1 windows"),
        ({"lepe": [(torch.zeros(8, 1, 3, 3), torch.zeros(16))] * 2}, r"\(8, 1, 3, 3\) and \(8,\).*\(16,\)"),
        ({"lepe": [(torch.zeros(8, 1, 5, 5), torch.zeros(8))] * 2}, r"\(8, 1, 5, 5\)"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 2}, "one window.*got 2 windows and lepe"),
        ({"start": 0, "lepe": None}, "one window.*got 2 windows and no lepe"),
        ({"start": 4, "lepe": None, "windows": ((2, 3),), "stride": 2}, r"start=4.*window=\(2, 3\) times stride=2"),
        ({"stride": 2, "lepe": None, "windows": ((None, 3),)}, "stride=2 needs a window of given sides"),
        (
            {"bias": torch.zeros(2, 3, 6), "lepe": None, "windows": ((2, 3),)},
            r"\(2, 6, 6\) or a table \(2, 3, 5\).*2x3, got shape=\(2, 3, 6\)",
        ),
    ],
)
def test_bad_shapes_are_named(change, message):
    qkv, options = window_inputs()
    arguments = {"qkv": qkv, **options, **change}
    with pytest.raises(ValueError, match=message):
        window_attention(arguments.pop("qkv"), **arguments)


def test_reasons_against_the_kernels():
    qkv, options = window_inputs(head_dim=12, windows=((65, 64), (2, 2)))
    options["lepe"] = [(weight.float(), bias.float()) for weight, bias in options["lepe"]]
    reasons = window_attention_unsupported(qkv, **options)
    assert len(reasons) == 5, "device, dtype, head dim, window and dtype of lepe"
    with pytest.raises(RuntimeError, match="cpu.*float64.*head_dim=12.*65x64.*float32"):
        window_attention(qkv, **options, backend="triton")
    with torch.device("meta"):
        large = torch.empty(1, 4096, 4096, 3, 4, 32, dtype=torch.bfloat16)
    assert any("elements per image" in reason for reason in window_attention_unsupported(large, windows=((1, 1),)))
