"""HiLo attention against a loop over windows, heads and positions, and against what the published code returned."""

import golden
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tessel.blocks import FullAttention, HiLo


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of queries `[N, C]` to keys and values `[M, C]`, as a loop over heads and queries."""
    out = torch.zeros_like(q)
    for c in torch.arange(q.shape[1]).chunk(heads):
        for i in range(len(q)):
            logits = (k[:, c] * q[i, c]).sum(1) / len(c) ** 0.5
            out[i, c] = (logits.softmax(0)[:, None] * v[:, c]).sum(0)
    return out


def by_loops(mixer: HiLo, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, as a loop over heads and windows."""
    dim, height, width = x.shape
    s = mixer.window
    rows, cols = -(-height // s), -(-width // s)
    padded = torch.zeros(rows * s, cols * s, dim, dtype=x.dtype)
    padded[:height, :width] = x.permute(1, 2, 0)
    cells = [(slice(i * s, i * s + s), slice(j * s, j * s + s)) for i in range(rows) for j in range(cols)]
    parts = []
    if mixer.high_heads:
        high = torch.zeros(rows * s, cols * s, mixer.h_proj.in_features, dtype=x.dtype)
        for cell in cells:
            q, k, v = mixer.h_qkv(padded[cell].reshape(s * s, dim)).chunk(3, -1)
            high[cell] = attention(q, k, v, mixer.high_heads).view(s, s, -1)
        parts.append(mixer.h_proj(high))
    if mixer.low_heads:
        means = torch.stack([padded[cell].sum((0, 1)) / s**2 for cell in cells])
        k, v = mixer.l_kv(means).chunk(2, -1)
        low = attention(mixer.l_q(padded).flatten(0, 1), k, v, mixer.low_heads)
        parts.append(mixer.l_proj(low).view(rows * s, cols * s, -1))
    return torch.cat(parts, -1)[:height, :width].permute(2, 0, 1)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    heads=st.sampled_from([1, 2, 3, 4]),
    window=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    channels_last=st.booleans(),
)
def test_equals_the_loop(height, width, heads, window, alpha, channels_last):
    torch.manual_seed(0)
    mixer = HiLo(3 * heads, num_heads=heads, window=window, alpha=alpha).double()
    x = torch.randn(2, 3 * heads, height, width, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


# window, alpha, (H, W), and the norm, sum, first and last number of the published code's output
PUBLISHED = [
    (2, 0.5, (6, 8), 28.541345021177, 14.634241193668, -0.450426725049, -0.120440620085),
    (2, 0.5, (5, 7), 23.205416481251, 11.062180683757, -0.167337187266, -0.155897764834),
    (3, 0.5, (5, 7), 17.701024671990, 21.521091472614, -0.527049422956, -0.122789889714),
    (2, 0.0, (5, 7), 26.907677139082, 0.639660150194, 0.845757623624, -0.369210786412),
    (2, 1.0, (5, 7), 10.376054660667, 24.044161122238, 0.149659326717, -0.169449939229),
    (1, 0.5, (5, 7), 18.033026376398, 25.576880363094, 0.190739055085, -0.534585137736),
    (4, 0.9, (5, 7), 13.440063646567, -77.198240532636, -0.375053929005, 0.091227693996),
]


@pytest.mark.parametrize(("window", "alpha", "size", "norm", "total", "first", "last"), PUBLISHED)
def test_equals_the_published_layer(window, alpha, size, norm, total, first, last):
    mixer = HiLo(32, num_heads=4, window=window, alpha=alpha).double()
    drawn = golden.published_state({"state": [(f"hilo.{key}", p.shape) for key, p in mixer.named_parameters()]})
    mixer.load_state_dict({key.removeprefix("hilo."): value for key, value in drawn.items()}, strict=True)
    x = golden.draw("hilo_in", (2, size[0] * size[1], 32)).unflatten(1, size).permute(0, 3, 1, 2)
    with torch.no_grad():
        y = mixer(x)
    got = [y.norm().item(), y.sum().item(), y[0, 0, 0, 0].item(), y[-1, -1, -1, -1].item()]
    assert got == pytest.approx([norm, total, first, last], rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(
    ("size", "window", "alpha"),
    [((4, 4), 2, 0.5), ((3, 5), 2, 0.5), ((1, 1), 3, 0.5), ((2, 3), 1, 0.5), ((3, 2), 2, 0)],
)
def test_gradcheck(size, window, alpha):
    mixer = HiLo(4, num_heads=2, window=window, alpha=alpha).double()
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_window_one_is_full_attention():
    mixer, full = HiLo(8, num_heads=2, window=1, alpha=0.0).double(), FullAttention(8, num_heads=2).double()
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([mixer.l_q.weight, mixer.l_kv.weight]))
        full.qkv.bias.copy_(torch.cat([mixer.l_q.bias, mixer.l_kv.bias]))
    full.proj.load_state_dict(mixer.l_proj.state_dict())
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), full(x), rtol=1e-12, atol=1e-12)


def test_padded_tokens_are_keys_with_a_bias():
    """A padded key is the bias of the projection, so a padded window differs from a smaller one."""
    mixer = HiLo(4, num_heads=1, window=2, alpha=0.0).double()
    x = torch.randn(1, 4, 1, 2, dtype=torch.float64)
    with torch.no_grad():
        padded = mixer(nn.functional.pad(x, (0, 0, 0, 1)))
        torch.testing.assert_close(mixer(x), padded[:, :, :1], rtol=1e-12, atol=1e-12)
        mixer.h_qkv.bias[4:] += 1.0
        assert not torch.allclose(mixer(x), padded[:, :, :1])


@pytest.mark.parametrize(
    ("heads", "alpha", "low"), [(12, 0.7, 8), (12, 0.9, 10), (16, 0.9, 14), (24, 0.9, 21), (4, 0.2, 0), (3, 1.0, 3)]
)
def test_heads_are_split_by_truncation(heads, alpha, low):
    mixer = HiLo(32 * heads, num_heads=heads, window=2, alpha=alpha)
    assert (mixer.low_heads, mixer.high_heads) == (low, heads - low)
    assert hasattr(mixer, "l_proj") == (low > 0) and hasattr(mixer, "h_proj") == (low < heads)


@pytest.mark.parametrize(("alpha", "count"), [(0.0, 28_089_760), (0.5, 27_647_392), (0.7, 27_696_544)])
def test_parameter_counts_of_the_published_alphas(alpha, count):
    model = timm.create_model("litv2_small", alpha=alpha, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=16.*num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2, "window": 0}, "window=0"),
        ({"num_heads": 2, "alpha": 1.5}, "alpha=1.5"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiLo(16, **arguments)
