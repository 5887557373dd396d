"""`fused_attention` splits batches that exceed the limit of one launch."""

import pytest
import torch

from tessel.blocks import CrossShapedWindow, FullAttention, Halo, HiLo, Strip, Window
from tessel.kernels import sdpa


@pytest.fixture
def batch_sizes(monkeypatch):
    """Set the limit to five batch entries. The list of the batch sizes of all launches."""
    batches = []
    launch = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, *args, **kwargs):
        batches.append(q.shape[0])
        return launch(q, *args, **kwargs)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(sdpa, "MAX_BATCH", 5)
    return batches


@pytest.mark.parametrize("biased", ["no bias", "one bias per entry", "one bias for all"])
def test_split_batch_gives_the_same_result(biased, batch_sizes):
    q, k, v = (torch.randn(12, 2, n, 8, dtype=torch.float64) for n in (3, 4, 4))
    entries = {"no bias": 0, "one bias per entry": 12, "one bias for all": 1}[biased]
    bias = torch.randn(entries, 2, 3, 4, dtype=torch.float64) if entries else None
    logits = 0.3 * q @ k.mT if bias is None else 0.3 * q @ k.mT + bias
    y = sdpa.fused_attention(q, k, v, bias, scale=0.3)
    torch.testing.assert_close(y, logits.softmax(-1) @ v, rtol=1e-12, atol=1e-12)
    assert batch_sizes == [5, 5, 2]


@pytest.mark.parametrize(
    "mixer",
    [
        CrossShapedWindow(16, num_heads=2, stripe_width=2),
        FullAttention(16, num_heads=2),
        Halo(16, num_heads=2, block_size=4, halo_size=1),
        HiLo(16, num_heads=2),
        Strip(16, num_heads=2, reduction=2),
        Window(16, num_heads=2, window=4),
    ],
    ids=lambda mixer: type(mixer).__name__,
)
def test_every_mixer_splits_its_batch(mixer, batch_sizes):
    with torch.no_grad():
        mixer(torch.randn(7, 16, 8, 8))
    assert max(batch_sizes) == 5


@pytest.mark.parametrize("entries", [1, 12])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_learned_bias_on_the_cpu(entries, dtype, tolerance, batch_sizes):
    torch.manual_seed(0)
    tensors = [torch.randn(12, 2, n, 8, dtype=dtype, requires_grad=True) for n in (3, 4, 4)]
    tensors.append(torch.randn(entries, 2, 3, 4, dtype=dtype, requires_grad=True))
    exact = [t.detach().double().requires_grad_() for t in tensors]
    q, k, v, bias = exact
    y, want = sdpa.fused_attention(*tensors, scale=0.3), (0.3 * q @ k.mT + bias).softmax(-1) @ v
    assert y.dtype == dtype and not batch_sizes
    dy = torch.randn_like(want)
    ours, theirs = torch.autograd.grad(y, tensors, dy.to(dtype)), torch.autograd.grad(want, exact, dy)
    for a, b in zip((y, *ours), (want, *theirs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_learned_bias_in_half_precision_takes_the_attention_of_torch(batch_sizes):
    q, k, v, bias = (torch.randn(2, 2, *n, requires_grad=True) for n in ((3, 8), (4, 8), (4, 8), (3, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        sdpa.fused_attention(q, k, v, bias.bfloat16())
    sdpa.fused_attention(*(t.bfloat16() for t in (q, k, v, bias)))
    assert batch_sizes == [2, 2]


@pytest.mark.parametrize("keys", [1, 9, 16, 49, 64, 65])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("split", [False, True])
def test_attention_to_few_keys(keys, dtype, tolerance, split, monkeypatch):
    if split:
        monkeypatch.setattr(sdpa, "_SCORES", 1)  # each image alone
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (50, keys, keys))
    bias = torch.randn(1, 3, keys, 50, dtype=dtype, requires_grad=True)
    found = sdpa.attention_to_few(q, k, v, bias)
    expected = ((q.double() @ k.double().mT) * 8**-0.5 + bias.double().mT).softmax(-1) @ v.double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    found, expected = (torch.autograd.grad(y.double().square().sum(), (q, k, v, bias)) for y in (found, expected))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).double().norm() <= tolerance * theirs.double().norm()
