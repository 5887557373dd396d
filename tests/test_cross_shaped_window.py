"""Cross-shaped window attention against a loop over windows and pixels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessel.blocks import CrossShapedWindow


def make(dim=8, num_heads=2, stripe_width: int | None = 2):
    torch.manual_seed(0)
    return CrossShapedWindow(dim, num_heads=num_heads, stripe_width=stripe_width).double()


def image(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def windows(height, width, stripe, *, vertical):
    """Each window as a list of (row, column). The stripes are centered on the map, so some positions lie outside."""
    if stripe is None:
        yield [(r, c) for r in range(height) for c in range(width)]
        return
    side = width if vertical else height
    start = -((-side % stripe) // 2)
    while start < side:
        across, along = range(start, start + stripe), range(height if vertical else width)
        yield [(b, a) if vertical else (a, b) for a in across for b in along]
        start += stripe


def reference(mixer, x):
    """The definition, as a loop over pixels and taps; values at positions outside the map or the window are zero."""
    batch, dim, height, width = x.shape
    heads, stripe = mixer.num_heads, mixer.stripe_width
    head_dim = dim // heads
    q, k, v = (t.unflatten(-1, (heads, head_dim)) for t in mixer.qkv(x.permute(0, 2, 3, 1)).chunk(3, -1))
    out = [[[torch.empty(0)] * heads for _ in range(width)] for _ in range(height)]
    for n in range(heads):
        conv = mixer.lepe[0 if stripe is None else n // (heads // 2)]
        first = n * head_dim % conv.weight.shape[0]
        taps, bias = conv.weight[first : first + head_dim, 0], conv.bias[first : first + head_dim]
        for window in windows(height, width, stripe, vertical=n < heads // 2):
            inside = [0 <= r < height and 0 <= c < width for r, c in window]

            def take(t, n=n, window=window, inside=inside):
                zero = torch.zeros(batch, head_dim, dtype=t.dtype)
                return [t[:, r, c, n] if here else zero for (r, c), here in zip(window, inside, strict=True)]

            queries, keys, values = (torch.stack(take(t), 1) for t in (q, k, v))
            y = ((queries @ keys.mT) / math.sqrt(head_dim)).softmax(-1) @ values
            of = dict(zip(window, take(v), strict=True))
            for i, (r, c) in enumerate(window):
                if inside[i]:
                    near = [
                        taps[:, dr + 1, dc + 1] * of[r + dr, c + dc]
                        for dr in (-1, 0, 1)
                        for dc in (-1, 0, 1)
                        if (r + dr, c + dc) in of
                    ]
                    out[r][c][n] = y[:, i] + bias + torch.stack(near).sum(0)
    y = torch.stack([torch.stack([torch.cat(pixel, -1) for pixel in row], 1) for row in out], 1)
    return mixer.proj(y).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("height", "width", "stripe_width"),
    [
        (4, 6, 1),
        (4, 6, 2),
        (5, 7, 2),
        (5, 4, 3),
        (2, 3, 5),
        (1, 1, 1),
        (1, 1, 4),
        (1, 3, 2),
        (3, 4, None),
        (1, 2, None),
    ],
)
def test_matches_the_definition_with_every_gradient(height, width, stripe_width):
    mixer = make(num_heads=4, stripe_width=stripe_width)
    x = image(2, 8, height, width).requires_grad_()
    leaves, weights = [x, *mixer.parameters()], image(2, 8, height, width)
    got, want = mixer(x), reference(mixer, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad((y * weights).sum(), leaves) for y in (got, want))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    half_heads=st.integers(1, 2),
    head_dim=st.integers(1, 3),
    stripe_width=st.none() | st.integers(1, 7),
)
def test_matches_the_definition_for_any_shape(batch, height, width, half_heads, head_dim, stripe_width):
    mixer = make(2 * half_heads * head_dim, 2 * half_heads, stripe_width)
    x = image(batch, 2 * half_heads * head_dim, height, width)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stripe_width", [1, 2, None])
def test_gradcheck(stripe_width):
    mixer = make(4, 2, stripe_width)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (image(1, 4, 3, 2).requires_grad_(), *values), fast_mode=True)
    assert torch.autograd.gradcheck(mixer, image(1, 4, 3, 2).requires_grad_())


@pytest.mark.parametrize("stripe_width", [1, 2])
def test_a_pixel_affects_only_its_cross(stripe_width):
    mixer, x = make(stripe_width=stripe_width), image(1, 8, 6, 6)
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    reached = (mixer(changed) - mixer(x)).abs().amax((0, 1)) > 0
    stripe = torch.arange(6) // stripe_width
    torch.testing.assert_close(reached, (stripe == stripe[2])[:, None] | (stripe == stripe[3])[None])


def test_one_stripe_over_the_whole_map_is_global_attention():
    striped, unstriped = make(stripe_width=4), make(stripe_width=None)
    state = {key: value for key, value in striped.state_dict().items() if not key.startswith("lepe")}
    for leaf in ("weight", "bias"):
        state[f"lepe.0.{leaf}"] = torch.cat([striped.state_dict()[f"lepe.{i}.{leaf}"] for i in (0, 1)])
    unstriped.load_state_dict(state)
    x = image(2, 8, 4, 4)
    torch.testing.assert_close(striped(x), unstriped(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stripe_width", [1, 3, None])
def test_float32_and_autocast_stay_close_to_float64(dtype, stripe_width):
    mixer, x = make(32, 4, stripe_width), image(2, 32, 5, 7)
    want = mixer(x)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    mixer.float()
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        y = mixer(x.float())
    assert y.dtype is dtype
    assert (y.double() - want).norm() < tolerance * want.norm()


def test_keeps_channels_last():
    x = image(2, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    assert make()(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3, "stripe_width": 2}, "dim=8 must be divisible by num_heads=3"),
        ({"num_heads": 1, "stripe_width": 2}, "num_heads=1 must be even"),
        ({"num_heads": 2, "stripe_width": 0}, "stripe_width=0 must be at least 1"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossShapedWindow(8, **arguments)


def test_one_head_is_allowed_without_stripes():
    assert CrossShapedWindow(8, num_heads=1, stripe_width=None)(torch.randn(1, 8, 3, 2)).shape == (1, 8, 3, 2)
