"""Bi-level routing attention against a loop over regions, heads and pixels, with both rules for uneven maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import BiLevelRouting, FlooredBiLevelRouting


def padded_qkv(mixer: BiLevelRouting, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """q, k and v of one image `[C, H, W]`, and number and size of its regions; padding is projected or is 0."""
    n, (height, width) = mixer.n_win, x.shape[1:]
    floored = isinstance(mixer, FlooredBiLevelRouting)
    size = [max(1, side // n) if floored else -(-side // n) for side in (height, width)]
    grid = [max(n, -(-side // s)) for side, s in zip((height, width), size, strict=True)]
    padding = (0, grid[1] * size[1] - width, 0, grid[0] * size[0] - height)
    x = x if floored else torch.nn.functional.pad(x, padding)
    qkv = torch.einsum("oc,chw->ohw", mixer.qkv.weight, x) + mixer.qkv.bias[:, None, None]
    qkv = torch.nn.functional.pad(qkv, padding) if floored else qkv
    return qkv, (grid[0], grid[1]), (size[0], size[1])


def by_loops(mixer: BiLevelRouting, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, as a loop over pixels."""
    dim, height, width = x.shape
    head_dim, floored = dim // mixer.num_heads, isinstance(mixer, FlooredBiLevelRouting)
    qkv, grid, (rows, cols) = padded_qkv(mixer, x)
    q, k, v = qkv.split(dim)
    regions = range(grid[0] * grid[1])

    def pixels(region: int) -> list[tuple[int, int]]:
        top, left = region // grid[1] * rows, region % grid[1] * cols
        return [(top + i, left + j) for i in range(rows) for j in range(cols)]

    def mean(t: Tensor, region: int) -> Tensor:
        inside = [(i, j) for i, j in pixels(region) if not floored or (i < height and j < width)]
        return torch.stack([t[:, i, j] for i, j in inside or pixels(region)]).mean(0)

    out = torch.zeros_like(v)
    for region in regions:
        affinity = torch.stack([mean(q, region) @ mean(k, other) for other in regions])
        partners = [p for other in affinity.topk(mixer.topk).indices.tolist() for p in pixels(other)]
        for i, j in pixels(region):
            for head in range(mixer.num_heads):
                c = slice(head * head_dim, (head + 1) * head_dim)
                logits = torch.stack([q[c, i, j] @ k[c, a, b] for a, b in partners]) * dim**-0.5
                weights = logits.softmax(0)
                out[c, i, j] = sum(w * v[c, a, b] for w, (a, b) in zip(weights, partners, strict=True))
    out = out + mixer.lepe(v[None])[0]
    out = torch.einsum("oc,chw->ohw", mixer.proj.weight, out) + mixer.proj.bias[:, None, None]
    return out[:, :height, :width]


@settings(deadline=None, max_examples=20)
@given(
    kind=st.sampled_from([BiLevelRouting, FlooredBiLevelRouting]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 3]),
    n_win=st.integers(1, 3),
    data=st.data(),
)
def test_equals_the_loop(kind, height, width, heads, n_win, data):
    topk = data.draw(st.integers(1, n_win**2))
    torch.manual_seed(0)
    mixer = kind(4 * heads, num_heads=heads, n_win=n_win, topk=topk).double()
    x = torch.randn(2, 4 * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [BiLevelRouting, FlooredBiLevelRouting])
@pytest.mark.parametrize(("size", "n_win", "topk"), [((4, 4), 2, 2), ((3, 5), 2, 1), ((1, 1), 1, 1)])
def test_gradcheck(kind, size, n_win, topk):
    mixer = kind(4, num_heads=2, n_win=n_win, topk=topk).double()
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    parameters = tuple(mixer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *parameters), fast_mode=True)


def test_route_returns_the_regions_of_highest_affinity():
    mixer = BiLevelRouting(4, num_heads=1, n_win=2, topk=4).double()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    index = mixer.route(x)
    assert index.shape == (1, 4, 4)
    assert index.sort().values.tolist() == [[[0, 1, 2, 3]] * 4], "all regions, once each"


def test_regions_are_rounded_up_or_down():
    """The published sizes of a map of 64 x 80 pixels: 9 x 11 pixels, in 8 x 8 regions instead of 7 x 7."""
    up, down = (kind(4, num_heads=1, n_win=7) for kind in (BiLevelRouting, FlooredBiLevelRouting))
    assert up.regions(64, 80) == ((7, 7), (10, 12))
    assert down.regions(64, 80) == ((8, 8), (9, 11)) and down.regions(13, 7) == ((13, 7), (1, 1))
    assert up.regions(14, 56) == down.regions(14, 56) == ((7, 7), (2, 8))
    assert down.route(torch.randn(1, 4, 64, 80)).shape == (1, 64, 4)


def test_both_rules_agree_on_even_maps():
    up, down = (kind(4, num_heads=1, n_win=3, topk=2).double() for kind in (BiLevelRouting, FlooredBiLevelRouting))
    down.load_state_dict(up.state_dict())
    x = torch.randn(2, 4, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(up(x), down(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(up(x[..., :8]), down(x[..., :8]))


def test_routing_does_not_depend_on_autocast():
    mixer = BiLevelRouting(16, num_heads=2, n_win=3, topk=2)
    x = torch.randn(1, 16, 9, 9).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        qkv = mixer.project(x)
        assert torch.equal(mixer.choose(qkv, (9, 9)), mixer.choose(qkv.float(), (9, 9)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_heads": 3}, "dim=16.*num_heads=3"), ({"num_heads": 2, "n_win": 2, "topk": 5}, "topk=5.*n_win")],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRouting(16, **arguments)
