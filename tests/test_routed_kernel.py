"""Routed attention on the CPU: the grouped form against the definition, opcheck, compile, autocast, FLOP count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import opcheck_pair
from torch.utils.flop_counter import FlopCounterMode

from tessel.kernels import routed_attention, routed_attention_reference, routed_attention_unsupported
from tessel.kernels.routed import grouped


def routed_inputs(batch=2, size=(8, 6), grid=(4, 3), heads=2, head_dim=8, topk=3, dtype=torch.float64):
    qkv = torch.randn(batch, *size, 3, heads, head_dim, dtype=dtype, requires_grad=True)
    regions = grid[0] * grid[1]
    index = torch.rand(batch, regions, regions).topk(topk).indices
    return qkv, index, {"grid": grid, "scale": 0.3}


def value_and_grad(op, qkv, index, settings, **kwargs):
    y = op(qkv, index, **settings, **kwargs)
    (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), qkv)
    return y.detach(), grad


@settings(deadline=None, max_examples=25)
@given(
    region=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    heads=st.integers(1, 3),
    group_bytes=st.sampled_from([1, 2000, 8 << 20]),
    fused=st.booleans(),
    data=st.data(),
)
def test_grouped_equals_the_definition(region, grid, heads, group_bytes, fused, data):
    topk = data.draw(st.integers(1, grid[0] * grid[1]))
    torch.manual_seed(0)
    size = (region[0] * grid[0], region[1] * grid[1])
    inputs = routed_inputs(size=size, grid=grid, heads=heads, topk=topk)
    expected = value_and_grad(routed_attention_reference, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "GROUP_BYTES", group_bytes)
        # without fused attention, as on other devices than the CPU
        patch.setattr(grouped, "keeps_statistics", lambda qkv: fused)
        torch.testing.assert_close(value_and_grad(routed_attention, *inputs), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("topk, region, whole", [(12, 4, True), (3, 2, True), (3, 4, False), (2, 2, False)])
def test_small_regions_attend_to_the_whole_map_under_a_mask(topk, region, whole):
    qkv, index, options = routed_inputs(size=(4 * region, 3 * region), topk=topk)
    _, grid, mask = grouped._whole_map(qkv, index, options["grid"])
    assert (grid == (1, 1)) is whole and (mask is not None) is (whole and topk < 12)
    expected = value_and_grad(routed_attention_reference, qkv, index, options)
    torch.testing.assert_close(value_and_grad(routed_attention, qkv, index, options), expected, rtol=1e-11, atol=1e-11)


def test_regions_selected_by_none_or_by_all():
    qkv, index, options = routed_inputs(topk=1)
    index = torch.zeros_like(index)
    value, grad = value_and_grad(routed_attention, qkv, index, options)
    torch.testing.assert_close((value, grad), value_and_grad(routed_attention_reference, qkv, index, options))
    assert grad[:, 2:, :, 1:].abs().max() == 0, "keys and values that no query attends to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    qkv, index, options = routed_inputs()
    expected = value_and_grad(routed_attention_reference, qkv, index, options)
    low = qkv.detach().to(dtype).requires_grad_()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    for got, want in zip(value_and_grad(routed_attention, low, index, options), expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() / want.norm() < tolerance


def test_expanded_and_strided_gradients():
    qkv, index, options = routed_inputs()
    for reduce in (lambda y: y.sum(), lambda y: torch.cat([y, y], -1)[..., 3:11].sum(), lambda y: y.mT.square().sum()):
        got, want = (
            torch.autograd.grad(reduce(op(qkv, index, **options)), qkv)[0]
            for op in (routed_attention, routed_attention_reference)
        )
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    qkv, index, options = routed_inputs()
    settings = (list(options["grid"]), options["scale"], False)
    opcheck_pair(
        "routed_attention",
        (qkv, index, *settings),
        lambda out, lse: (qkv, index, out, lse, torch.randn_like(out), *settings),
    )


def test_operator_called_directly_has_a_gradient():
    qkv, index, options = routed_inputs()
    out, lse = torch.ops.tessel.routed_attention(qkv, index, options["grid"], options["scale"], False)
    assert not lse.requires_grad
    got, want = (
        torch.autograd.grad(y.square().sum(), qkv)[0] for y in (out, routed_attention_reference(qkv, index, **options))
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    qkv, index, options = routed_inputs(batch=1, size=(4, 2), grid=(2, 1), heads=1, head_dim=4, topk=2)
    assert torch.autograd.gradcheck(lambda x: routed_attention(x, index, **options), (qkv,), fast_mode=True)


def test_no_double_backward():
    qkv, index, options = routed_inputs()
    y = routed_attention(qkv, index, **options)
    (grad,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_compiles_with_dynamic_sizes():
    compiled = torch.compile(routed_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((8, 6), (12, 9)):
        qkv, index, options = routed_inputs(size=size)
        torch.testing.assert_close(
            value_and_grad(compiled, qkv, index, options), value_and_grad(routed_attention, qkv, index, options)
        )
    torch._dynamo.reset()


def test_autocast_casts():
    qkv, index, options = routed_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert routed_attention(qkv, index, **options).dtype == torch.bfloat16


def test_flops_are_counted():
    qkv, index, options = routed_inputs()
    with FlopCounterMode(display=False) as counter:
        routed_attention(qkv, index, **options).sum().backward()
    products = 2 * 2 * 48 * 2 * 8 * (3 * 4)  # 2 FLOPs, batch, pixels, heads, head dim, keys per query
    assert counter.get_total_flops() == (2 + 5) * products


def test_empty_batch():
    qkv, index, options = routed_inputs(batch=0)
    y, grad = value_and_grad(routed_attention, qkv, index, options)
    assert y.shape == (0, 8, 6, 2, 8) and grad.shape == qkv.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 3)}, "H=8, W=6.*3x3"),
        ({"qkv": torch.zeros(1, 2, 2, 8)}, r"\(1, 2, 2, 8\)"),
        ({"index": torch.zeros(2, 5, 1, dtype=torch.long)}, r"R=12.*\(2, 5, 1\)"),
    ],
)
def test_bad_shapes_are_named(change, message):
    qkv, index, options = routed_inputs()
    arguments = {"qkv": qkv, "index": index, **options, **change}
    with pytest.raises(ValueError, match=message):
        routed_attention(arguments.pop("qkv"), arguments.pop("index"), **arguments)


def test_every_reason_is_named():
    qkv, index, options = routed_inputs(head_dim=12)
    reasons = routed_attention_unsupported(qkv, index, grid=options["grid"])
    assert len(reasons) == 3, "device, dtype and head dim"
    with pytest.raises(RuntimeError, match="cpu.*float64.*head_dim=12"):
        routed_attention(qkv, index, **options, backend="triton")
