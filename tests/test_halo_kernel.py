"""Halo attention on the CPU: choice of a backend, reasons, errors, autocast, FLOP count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tessel.kernels import halo_attention, halo_attention_reference, halo_attention_unsupported

SIZES = {"block_size": 4, "halo_size": 1, "stride": 2}


def halo_inputs(batch=2, head_dim=8, dtype=torch.float32, device="cpu"):
    shapes = [(batch, 3, 4, 2, head_dim), (batch, 6, 7, 2, head_dim + 16), (11, head_dim), (11, head_dim)]
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def test_plain_pytorch_is_the_reference():
    tensors = halo_inputs()
    want = halo_attention_reference(*tensors, **SIZES)
    for backend in (None, "auto", "reference"):
        assert torch.equal(halo_attention(*tensors, **SIZES, backend=backend), want)
    assert want.shape == (2, 3, 4, 2, 16)


def test_reasons():
    q, kv, *tables = halo_inputs(head_dim=12)
    wide = torch.cat([kv, kv], -1)[..., :-2].double()
    reasons = halo_attention_unsupported(q, wide, block_size=64, halo_size=1)
    expected = ("device=cpu", "dtype=float32", "head_dim=12", "value_dim=42", "kv.dtype=torch.float64", "4356 keys")
    assert len(reasons) == len(expected)
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason
    with pytest.raises(RuntimeError, match="halo_attention: .*cpu.*float32.*head_dim=12"):
        halo_attention(q, kv, *tables, **SIZES, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 3}, "block_size=3 .*divisible by stride=2"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"halo_size": -1}, "halo_size=-1 at least 0"),
        ({"stride": 0}, "stride=0"),
        ({"q": (2, 3, 4, 8)}, r"q must be \[B.*\(2, 3, 4, 8\)"),
        ({"kv": (2, 6, 7, 2, 8)}, r"D \+ E\].*\(2, 6, 7, 2, 8\)"),
        ({"q": (2, 3, 3, 2, 8)}, r"q must be \(2, 3, 4, 2, 'D'\) .*stride=2, got shape=\(2, 3, 3, 2, 8\)"),
        ({"q": (2, 3, 4, 1, 8)}, r"got shape=\(2, 3, 4, 1, 8\)"),
        ({"width_rel": (10, 8)}, r"must be \(11, 8\) for block_size=4, halo_size=1, .*\(10, 8\)"),
        ({"height_rel": (11, 4)}, r"must be \(11, 8\).*\(11, 4\)"),
        ({"backend": "cuda"}, "'cuda'.*auto, triton, reference"),
    ],
    ids=str,
)
def test_bad_shapes_are_named(change, message):
    change = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in change.items()}
    arguments = dict(zip(("q", "kv", "height_rel", "width_rel"), halo_inputs(), strict=True)) | SIZES | change
    with pytest.raises(ValueError, match=message):
        halo_attention(**arguments)


def test_autocast_casts():
    tensors = halo_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = halo_attention(*tensors, **SIZES)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in tensors)


def test_flops_of_the_kernels():
    q, kv, *_ = halo_inputs(device="meta")
    rel = q.new_empty(*q.shape[:4], 2, 8)
    with FlopCounterMode(display=False) as counter:
        out, lse = torch.ops.tessel.halo_attention(q, kv, rel, *SIZES.values(), False)
        grads = torch.ops.tessel.halo_attention_backward(q, kv, rel, out, lse, out, *SIZES.values(), False)
    assert [x.shape for x in grads] == [q.shape, kv.shape, rel.shape]
    pairs = 2 * 3 * 4 * 2 * 6**2  # batch, queries, heads, keys of a window
    assert counter.get_total_flops() == 2 * pairs * ((8 + 16) + (3 * 8 + 2 * 16))


def test_empty_batch():
    tensors = halo_inputs(batch=0)
    y = halo_attention(*tensors, **SIZES)
    y.sum().backward()
    assert y.shape == (0, 3, 4, 2, 16) and tensors[0].grad.shape == tensors[0].shape
