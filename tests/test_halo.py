"""Halo attention against a loop over queries and keys, and HaloNet against timm."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import ClassifierHead
from timm.layers.halo_attn import HaloAttn

import tessel.zoo
from tessel.blocks import Halo
from tessel.kernels import halo
from tessel.zoo import from_published, to_published


def create(name: str, **options) -> Any:
    return timm.create_model(name, **options)


def reference(mixer, x, *, block, radius, stride=1, masked=False):
    """The definition, as a loop over queries and keys. With stride 2, the caller must apply the average pooling."""
    heads, height_rel, width_rel = mixer.num_heads, mixer.height_rel, mixer.width_rel
    head_dim = height_rel.shape[1]
    (height, width), window = x.shape[-2:], block + 2 * radius
    pixels = x.permute(0, 2, 3, 1)
    q = (pixels @ mixer.q.weight.T).unflatten(-1, (heads, head_dim))
    k, v = (pixels @ mixer.kv.weight.T).unflatten(-1, (heads, -1)).tensor_split([head_dim], dim=-1)
    rows = []
    for y in range(0, height, stride):
        for z in range(0, width, stride):
            top, left = y // block * block, z // block * block
            iy, iz = (y - top) // stride, (z - left) // stride
            logits, values = [], []
            for jy in range(window):
                for jz in range(window):
                    ky, kz = top - radius + jy, left - radius + jz
                    inside = 0 <= ky < height and 0 <= kz < width
                    if masked and not inside:
                        continue
                    rel = height_rel[jy - iy + window - 1] + width_rel[jz - iz + window - 1]
                    key = k[:, ky, kz] * head_dim**-0.5 if inside else torch.zeros_like(k[:, 0, 0])
                    logits.append((q[:, y, z] * (key + rel)).sum(-1))
                    values.append(v[:, ky, kz] if inside else torch.zeros_like(v[:, 0, 0]))
            weights = torch.stack(logits).softmax(0).unsqueeze(-1)
            rows.append((weights * torch.stack(values)).sum(0).flatten(1))
    return torch.stack(rows, -1).unflatten(-1, (-(-height // stride), -(-width // stride)))


def parameters(mixer):
    return dict(mixer.named_parameters())


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    block=st.integers(1, 5),
    radius=st.integers(0, 3),
    stride=st.sampled_from([1, 2]),
    masked=st.booleans(),
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.integers(1, 4),
    value_dim=st.integers(1, 4),
)
def test_matches_the_definition(size, block, radius, stride, masked, heads, head_dim, value_dim):
    torch.manual_seed(0)
    mixer = Halo(
        5,
        num_heads=heads,
        out_dim=heads * value_dim,
        head_dim=head_dim,
        block_size=block,
        halo_size=radius,
        stride=stride,
        mask_border=masked,
    ).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    pooled = stride == 2 and block % 2 == 1
    want = reference(mixer, x, block=block, radius=radius, stride=1 if pooled else stride, masked=masked)
    if pooled:
        want = F.avg_pool2d(want, 2, ceil_mode=True)
    got = mixer(x)
    assert got.shape == (2, heads * value_dim, -(-size[0] // stride), -(-size[1] // stride))
    assert_same(got, want)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_match_the_definition(masked):
    torch.manual_seed(0)
    mixer = Halo(4, num_heads=2, out_dim=6, head_dim=3, block_size=2, halo_size=1, mask_border=masked).double()
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    weight = torch.randn(1, 6, 3, 5, dtype=torch.float64)
    got = torch.autograd.grad((mixer(x) * weight).sum(), wanted)
    want = torch.autograd.grad((reference(mixer, x, block=2, radius=1, masked=masked) * weight).sum(), wanted)
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype):
    torch.manual_seed(0)
    mixer = Halo(16, num_heads=2, block_size=2, halo_size=1).to(dtype)
    x = torch.randn(2, 16, 5, 6, dtype=dtype, requires_grad=True)
    exact = copy.deepcopy(mixer).double(), x.detach().double().requires_grad_()
    dx, dkv = torch.autograd.grad(mixer(x).sum(), [x, mixer.kv.weight])
    want = torch.autograd.grad(exact[0](exact[1]).sum(), [exact[1], exact[0].kv.weight])
    for one, other in zip((dx, dkv), want, strict=True):
        assert (one.double() - other).abs().max() < 0.03 * other.abs().max()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 2, "block_size": 3}, {"mask_border": True}], ids=str)
def test_gradcheck(options):
    torch.manual_seed(0)
    mixer = Halo(2, **{"num_heads": 1, "block_size": 2, "halo_size": 1, **options}).double()
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*parameters(mixer).items(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *values))


def from_timm(layer, **options):
    """Our mixer with the weights of timm's layer."""
    ours = Halo(layer.q.in_channels, num_heads=layer.num_heads, head_dim=layer.dim_head_qk, **options).to(
        layer.q.weight
    )
    keys = {"q.weight": "q.weight", "kv.weight": "kv.weight"}
    keys |= {"height_rel": "pos_embed.height_rel", "width_rel": "pos_embed.width_rel"}
    state = layer.state_dict()
    ours.load_state_dict({own: state[key].flatten(1) for own, key in keys.items()})
    return ours


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 8, "halo_size": 3},
        {"block_size": 4, "halo_size": 2, "stride": 2},
        {"block_size": 7, "halo_size": 2, "stride": 2, "qk_ratio": 0.33},
        {"block_size": 4, "halo_size": 1, "dim_out": 48, "dim_head": 8},
    ],
    ids=str,
)
def test_matches_timm(options):
    torch.manual_seed(0)
    layer = HaloAttn(32, num_heads=4, **options).double()
    own = {key: value for key, value in options.items() if key in ("block_size", "halo_size", "stride")}
    ours = from_timm(layer, out_dim=options.get("dim_out", 32), **own)
    x = torch.randn(2, 32, 2 * options["block_size"], 4 * options["block_size"], dtype=torch.float64)
    assert_same(ours(x), layer(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_uneven_maps_equal_timm_on_padded_maps(stride):
    torch.manual_seed(0)
    layer = HaloAttn(16, num_heads=2, block_size=4, halo_size=1, stride=stride).double()
    ours = from_timm(layer, block_size=4, halo_size=1, stride=stride)
    x = torch.randn(1, 16, 9, 6, dtype=torch.float64)
    rows, cols = -(-9 // stride), -(-6 // stride)
    assert_same(ours(x), layer(F.pad(x, (0, 2, 0, 3)))[:, :, :rows, :cols])


def test_mask_border_does_not_change_inner_windows():
    torch.manual_seed(0)
    zeros = Halo(8, num_heads=2, block_size=2, halo_size=2).double()
    masked = Halo(8, num_heads=2, block_size=2, halo_size=2, mask_border=True).double()
    masked.load_state_dict(zeros.state_dict())
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    one, other = zeros(x), masked(x)
    assert_same(one[:, :, 2:4, 2:4], other[:, :, 2:4, 2:4])
    assert (one - other)[:, :, 0].abs().min() > 1e-6
    pixel = x[:, :, :1, :1]
    values = F.linear(pixel[:, :, 0, 0], masked.kv.weight).unflatten(-1, (2, 8))[..., 4:].flatten(1)
    assert_same(masked(pixel)[:, :, 0, 0], values)


@pytest.mark.parametrize("masked", [False, True])
def test_window_groups_do_not_change_the_output(monkeypatch, masked):
    torch.manual_seed(0)
    mixer = Halo(8, num_heads=2, block_size=2, halo_size=1, mask_border=masked).double()
    x = torch.randn(2, 8, 5, 9, dtype=torch.float64)
    want = mixer(x)
    # the mixer now computes three of the thirty windows at a time
    monkeypatch.setattr(halo.reference, "CHUNK_BYTES", 3 * 2 * 4 * 16 * 8)
    with torch.no_grad():
        assert_same(mixer(x), want)


@pytest.mark.parametrize("stride", [1, 2])
def test_unused_rows_of_the_tables_get_no_gradient(stride):
    torch.manual_seed(0)
    mixer = Halo(8, num_heads=2, block_size=4, halo_size=1, stride=stride)
    mixer(torch.randn(1, 8, 8, 8)).square().sum().backward()
    for table in (mixer.height_rel, mixer.width_rel):
        assert table.grad is not None
        used = table.grad.abs().sum(1) > 0
        assert used.tolist() == [False] * (6 - 4 // stride) + [True] * (11 - 6 + 4 // stride)


def test_memory_formats_dtypes_and_deep_copies():
    torch.manual_seed(0)
    mixer = Halo(16, num_heads=4, block_size=4, halo_size=1)
    x = torch.randn(2, 16, 8, 8)
    with torch.inference_mode():
        want = mixer(x)
        last = mixer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, want)
    copied = copy.deepcopy(mixer).double()
    torch.testing.assert_close(copied(x.double()).float(), want)
    half = copy.deepcopy(mixer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "out_dim=16 must be divisible by num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 4, "out_dim": 18}, "out_dim=18 must be divisible by num_heads=4"),
        ({"num_heads": 4, "head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"num_heads": 4, "block_size": 0}, "block_size=0 must be at least 1"),
        ({"num_heads": 4, "halo_size": -1}, "halo_size=-1 at least 0"),
        ({"num_heads": 4, "stride": 3}, "stride=3 must be 1 or 2"),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Halo(16, **options)


def random_state(model):
    """Random weights and running statistics with which every branch of every block has an effect."""
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.dim() > 1:
            state[key] = (noise / value[0].numel() ** 0.5).to(value)
        elif value.is_floating_point():
            state[key] = (0.1 * noise + (0 if key.endswith(("bias", "running_mean")) else 1.5)).abs().to(value)
    return state


@pytest.mark.parametrize("name", ["halonet26t", "sehalonet33ts"])
def test_model_matches_timm(name):
    theirs, ours = (create(n).double().eval() for n in (name, "tessel_" + name))
    state = random_state(theirs)
    theirs.load_state_dict(state)
    ours.load_state_dict(from_published("tessel_" + name, state))
    x = torch.randn(1, 3, 256, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs.stem(x)
        maps = ours.forward_intermediates(x, intermediates_only=True)
        for stage, got in zip(theirs.stages, maps, strict=True):
            want = stage(want)
            assert_same(got / want.norm(), want / want.norm())
        assert_same(ours.forward_head(maps[-1]), theirs.forward_head(theirs.final_conv(want)))
    floating = {key: value for key, value in state.items() if value.is_floating_point()}
    back = to_published("tessel_" + name, ours.state_dict())
    assert back.keys() == floating.keys()
    assert all(torch.equal(back[key], floating[key]) for key in floating)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("h0", 5.5), ("h1", 8.1), ("h2", 9.4), ("h3", 11.8), ("h4", 19.1), ("h5", 30.7), ("h6", 43.4), ("h7", 67.4)],
)
def test_parameter_counts_of_the_paper(name, millions):
    model = create(f"tessel_halonet_{name}", device="meta")
    # the paper truncates h6 to 43.4; the exact number is 43.46
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_initial_residual_branches_are_zero_and_reset_keeps_the_final_convolution():
    model = create("tessel_halonet_atto")
    last_norms = [value for key, value in model.named_parameters() if key.endswith("expand.norm.weight")]
    assert len(last_norms) == 6 and not any(value.detach().any() for value in last_norms)
    final = model.head.final_conv.conv.weight.clone()
    model.reset_classifier(5)
    assert torch.equal(model.head.final_conv.conv.weight, final)
    assert model.head_hidden_size == 128


@pytest.mark.parametrize("reset", [False, True])
def test_model_without_classifier_and_pooling_returns_the_last_stage(reset):
    model = create("tessel_halonet_atto", **({} if reset else {"num_classes": 0, "global_pool": ""})).eval()
    if reset:
        model.reset_classifier(0, "")
    x = torch.randn(1, 3, 40, 52)
    assert model.head_hidden_size == model.num_features
    assert torch.equal(model(x), model.forward_features(x))
    assert not [key for key in model.state_dict() if "final_conv" in key]
    model.reset_classifier(3, "avg")
    assert isinstance(model.head, ClassifierHead)
    assert model(x).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("C", "CB", "A", "A")}, "must consist of A"),
        ({"widths": (16, 32, 48)}, "widths=.* must have 4 entries"),
        ({"act": "swoosh"}, "act='swoosh'"),
    ],
)
def test_invalid_model_options_are_errors(options, message):
    assert "tessel_halonet_atto" in tessel.zoo.list_models()
    with pytest.raises(ValueError, match=message):
        create("tessel_halonet_atto", **options)
