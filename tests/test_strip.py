"""Strip self-attention against plain dense attention; parameter counts and published keys of S2AFormer."""

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tessel.zoo
from tessel.blocks import Strip


def by_heads(mixer: Strip, x: Tensor) -> Tensor:
    """The mixer, with plain dense attention head by head; the reduction of the keys is the mixer's own."""
    s, (height, width) = mixer.reduction, x.shape[2:]
    reduced = mixer.reduce(F.pad(x, (0, -width % s, 0, -height % s)))
    tokens, reduced_tokens = x.flatten(2).mT, reduced.flatten(2).mT
    q, k, v = mixer.q(tokens), mixer.k(reduced_tokens), mixer.v(reduced_tokens)
    d, v_dim, parts = mixer.qk_dim, v.shape[-1] // mixer.num_heads, []
    for head in range(mixer.num_heads):
        q_h, k_h = (t[..., head * d : (head + 1) * d] for t in (q, k))
        weights = (q_h @ k_h.mT / d**0.5).softmax(-1)
        parts.append(weights @ v[..., head * v_dim : (head + 1) * v_dim])
    return mixer.proj(torch.cat(parts, -1)).mT.unflatten(2, (height, width))


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    heads=st.sampled_from([1, 2]),
    reduction=st.sampled_from([1, 2, 4, 8]),
    qk_dim=st.sampled_from([1, 2, 8]),
)
def test_equals_dense_attention(height, width, heads, reduction, qk_dim):
    torch.manual_seed(0)
    mixer = Strip(8 * heads, num_heads=heads, reduction=reduction, qk_dim=qk_dim).double().eval()
    x = torch.randn(2, 8 * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), by_heads(mixer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("reduction", "qk_dim"), [(1, 1), (2, 2)])
def test_gradcheck(reduction, qk_dim):
    mixer = Strip(4, num_heads=2, reduction=reduction, qk_dim=qk_dim).double().eval()
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=8.*num_heads=3"),
        ({"num_heads": 2, "qk_dim": 5}, "qk_dim=5.*1..dim / num_heads=4"),
        ({"num_heads": 2, "reduction": 0}, "reduction=0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Strip(8, **arguments)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("s2aformer_mini", 5_000_926),
        ("s2aformer_tiny", 5_871_204),
        ("s2aformer_xsmall", 6_447_996),
        ("s2aformer_small", 10_708_118),
        ("s2aformer_medium", 25_173_512),
    ],
)
def test_parameter_counts(name, parameters):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_key_is_converted_in_both_directions():
    state = {k: v for k, v in timm.create_model("s2aformer_atto").state_dict().items() if v.is_floating_point()}
    published = tessel.zoo.to_published("s2aformer_atto", state)
    assert published["stages.0.blocks.0.attn.q.weight"].shape == (1, 16, 1, 1)
    back = tessel.zoo.from_published("s2aformer_atto", published)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
