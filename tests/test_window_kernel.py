"""Window attention on the CPU: the definition against a loop over pixels, reasons, errors, autocast, FLOP count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tessel.kernels import window_attention, window_attention_reference, window_attention_unsupported


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


def test_flops_are_counted():
    pytest.importorskip("triton")
    qkv, options = window_inputs()
    product, taps = 2 * 24 * 8 * (8 + 12), 2 * 9 * 24 * 16
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        arguments = [t.to("meta") for pair in options["lepe"] for t in pair], [4, 2, 2, 6], 1.0
        out, lse = torch.ops.tessel.window_attention(qkv.to("meta"), *arguments)
        assert lse.numel() == 0, "windows of one tile save no lse"
        forward = counter.get_total_flops()
        grads, lepe = torch.ops.tessel.window_attention_backward(qkv.to("meta"), arguments[0], lse, out, *arguments[1:])
    assert forward == 2 * product + taps
    assert counter.get_total_flops() - forward == 5 * product + 2 * taps
    assert grads.shape == qkv.shape and [g.shape for g in lepe] == [t.shape for t in arguments[0]]


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
