"""Bi-level routing attention against a loop over regions, heads and pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import BiLevelRouting


def by_loops(mixer: BiLevelRouting, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, as a loop over pixels."""
    dim, height, width = x.shape
    n, head_dim = mixer.n_win, dim // mixer.num_heads
    rows, cols = -(-height // n), -(-width // n)  # size of a region
    padded = torch.zeros(dim, rows * n, cols * n, dtype=x.dtype)
    padded[:, :height, :width] = x
    qkv = torch.einsum("oc,chw->ohw", mixer.qkv.weight, padded) + mixer.qkv.bias[:, None, None]
    q, k, v = qkv.split(dim)

    def pixels(region: int) -> list[tuple[int, int]]:
        top, left = region // n * rows, region % n * cols
        return [(top + i, left + j) for i in range(rows) for j in range(cols)]

    def mean(t: Tensor, region: int) -> Tensor:
        return torch.stack([t[:, i, j] for i, j in pixels(region)]).mean(0)

    out = torch.zeros_like(v)
    for region in range(n * n):
        affinity = torch.stack([mean(q, region) @ mean(k, other) for other in range(n * n)])
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
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 3]),
    n_win=st.integers(1, 3),
    data=st.data(),
)
def test_equals_the_loop(height, width, heads, n_win, data):
    topk = data.draw(st.integers(1, n_win**2))
    torch.manual_seed(0)
    mixer = BiLevelRouting(4 * heads, num_heads=heads, n_win=n_win, topk=topk).double()
    x = torch.randn(2, 4 * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("size", "n_win", "topk"), [((4, 4), 2, 2), ((3, 5), 2, 1), ((1, 1), 1, 1)])
def test_gradcheck(size, n_win, topk):
    mixer = BiLevelRouting(4, num_heads=2, n_win=n_win, topk=topk).double()
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    parameters = tuple(mixer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *parameters), fast_mode=True)


def test_route_returns_the_regions_of_highest_affinity():
    mixer = BiLevelRouting(4, num_heads=1, n_win=2, topk=4).double()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    index = mixer.route(x)
    assert index.shape == (1, 4, 4)
    assert index.sort().values.tolist() == [[[0, 1, 2, 3]] * 4], "all regions, once each"


def test_routing_does_not_depend_on_autocast():
    mixer = BiLevelRouting(16, num_heads=2, n_win=3, topk=2)
    x = torch.randn(1, 16, 9, 9).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        qkv = mixer.project(x)
        assert torch.equal(mixer.choose(qkv), mixer.choose(qkv.float()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_heads": 3}, "dim=16.*num_heads=3"), ({"num_heads": 2, "n_win": 2, "topk": 5}, "topk=5.*n_win")],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRouting(16, **arguments)
