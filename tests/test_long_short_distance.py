"""Long short distance attention against a loop over groups, heads and queries; CrossFormer's embedding and keys."""

import golden
import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tessel.zoo
from tessel.blocks import CrossScale, DynamicPositionBias, LongShortDistance
from tessel.blocks import long_short_distance as module


def position(bias: DynamicPositionBias, rows: int, columns: int) -> Tensor:
    """The bias of each head for one offset, query minus key."""
    x = bias.embed(torch.tensor([float(rows), float(columns)], dtype=torch.float64))
    for layer in bias.layers:
        x = layer.fc(nn.functional.layer_norm(x, x.shape, layer.norm.weight, layer.norm.bias).relu())
    return x


def by_loops(mixer: LongShortDistance, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`: every token attends to the tokens of its group that lie within the map."""
    dim, height, width = x.shape
    g, step = mixer.group, mixer.interval
    if min(height, width) <= g:
        g, step = max(height, width), 1
    heads = torch.arange(dim).chunk(mixer.num_heads)
    q, k, v = mixer.qkv(x.permute(1, 2, 0)).chunk(3, -1)

    def group(y: int, z: int) -> tuple[int, ...]:
        side = g * step
        return y // side, z // side, y % step, z % step

    tokens = [(y, z) for y in range(height) for z in range(width)]
    out = torch.zeros(height, width, dim, dtype=x.dtype)
    for y, z in tokens:
        keys = [(a, b) for a, b in tokens if group(a, b) == group(y, z)]
        bias = torch.stack([position(mixer.position, (y - a) // step, (z - b) // step) for a, b in keys])
        for n, c in enumerate(heads):
            logits = torch.stack([k[a, b, c] @ q[y, z, c] for a, b in keys]) / len(c) ** 0.5 + bias[:, n]
            out[y, z, c] = sum(w * v[a, b, c] for w, (a, b) in zip(logits.softmax(0), keys, strict=True))
    return mixer.proj(out).permute(2, 0, 1)


@settings(max_examples=12)
@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    heads=st.sampled_from([1, 2]),
    group=st.integers(1, 3),
    interval=st.integers(1, 3),
)
@example(height=5, width=7, heads=2, group=2, interval=2)
@example(height=5, width=7, heads=2, group=2, interval=1)
def test_equals_the_loop(height, width, heads, group, interval):
    torch.manual_seed(0)
    mixer = LongShortDistance(32, num_heads=heads, group=group, interval=interval).double()
    x = torch.randn(2, 32, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("size", "group", "interval"), [((4, 4), 2, 1), ((4, 5), 2, 2), ((1, 3), 2, 1)])
def test_gradcheck(size, group, interval):
    mixer = LongShortDistance(32, num_heads=2, group=group, interval=interval).double()
    x = torch.randn(1, 32, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize(("size", "interval"), [((4, 8), 1), ((5, 7), 1), ((8, 8), 2), ((7, 9), 3), ((2, 5), 2)])
def test_in_place_where_the_kernels_run(monkeypatch, size, interval):
    """The form that the kernels take gives the same, gradients included."""
    mixer = LongShortDistance(32, num_heads=2, group=2, interval=interval).double()
    x = torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True)
    tensors = [x, *mixer.parameters()]
    y = mixer(x)
    want = y, *torch.autograd.grad(y.square().sum(), tensors)
    monkeypatch.setattr(module, "window_kernels_run", lambda *_, **__: True)
    y = mixer(x)
    torch.testing.assert_close((y, *torch.autograd.grad(y.square().sum(), tensors)), want, rtol=1e-9, atol=1e-9)


def test_a_small_map_does_not_change_how_the_next_one_is_computed():
    mixer = LongShortDistance(32, num_heads=2, group=2, interval=2).double()
    x = torch.randn(1, 32, 8, 8, dtype=torch.float64)
    before = mixer(x)
    mixer(x[:, :, :2])
    assert torch.equal(mixer(x), before)


def test_half_precision_masks_groups_of_padding():
    """Some groups of this map consist of padding only; their softmax must not spoil the others."""
    mixer = LongShortDistance(32, num_heads=2, group=2, interval=3)
    x = torch.randn(1, 32, 7, 7)
    expected = mixer(x)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        torch.testing.assert_close(mixer.to(dtype)(x.to(dtype)).float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=32.*num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2, "group": 0}, "group=0"),
        ({"num_heads": 2, "interval": 0}, "interval=0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LongShortDistance(32, **arguments)


@pytest.mark.parametrize(("kernels", "widths"), [((4, 8, 16, 32), [8, 4, 2, 2]), ((2, 4), [8, 8]), ((4,), [16])])
def test_larger_kernels_have_fewer_channels(kernels, widths):
    layer, stride, x = CrossScale(3, 16, kernels=kernels, stride=kernels[0]), kernels[0], torch.randn(1, 3, 32, 35)
    assert [conv.weight.shape[0] for conv in layer.convs] == widths
    assert layer(x).shape == (1, 16, 32 // stride, 35 // stride)
    padding = [(kernel - stride) // 2 for kernel in kernels]
    parts = [nn.functional.conv2d(x, c.weight, c.bias, stride, p) for c, p in zip(layer.convs, padding, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(parts, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernels": (8, 4), "stride": 4}, r"kernels=\(8, 4\)"),
        ({"kernels": (4, 7), "stride": 4}, "even numbers"),
        ({"kernels": (2,), "stride": 4}, "stride=4"),
        ({"kernels": (4, 8, 16, 32), "stride": 4}, "out_chs=12 must be divisible by 8"),
    ],
)
def test_embedding_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossScale(3, 12, **arguments)


def test_buffers_of_the_first_code_are_dropped():
    """The code of 2021 stores offsets and indices of the position bias with the weights."""
    model = timm.create_model("crossformer_atto")
    state = tessel.zoo.to_published("crossformer_atto", model.state_dict())
    old = {"layers.0.blocks.0.attn.biases": torch.zeros(49, 2)}
    old |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
    ours = tessel.zoo.from_published("crossformer_atto", state | old)
    assert ours.keys() == model.state_dict().keys()


def test_a_file_of_the_published_layout_loads(tmp_path):
    """A training checkpoint; the weights are those of the record, by the keys of the authors."""
    state = golden.published_state(golden.load("crossformer_pp_small"))
    torch.save({"model": state, "max_accuracy": 83.2, "epoch": 299}, tmp_path / "crossformer.pth")
    overlay = {"file": str(tmp_path / "crossformer.pth")}
    model = timm.create_model("crossformer_pp_small.in1k", pretrained=True, pretrained_cfg_overlay=overlay)
    loaded = tessel.zoo.to_published("crossformer_pp_small", model.state_dict())
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in state.items())


def test_cooling_layers_end_every_third_block_but_the_last():
    model = timm.create_model("crossformer_pp_huge", device="meta")
    cooled = [[i for i, block in enumerate(stage.blocks) if hasattr(block, "cooling")] for stage in model.stages]
    assert cooled == [[2], [2], [2, 5, 8, 11, 14], []]
    plain = timm.create_model("crossformer_base", device="meta")
    assert not any(hasattr(block, "cooling") for stage in plain.stages for block in stage.blocks)


def test_groups_change_without_changing_weights():
    """The released dense-prediction models of CrossFormer++ have other groups than its classifiers."""
    state = timm.create_model("crossformer_atto").state_dict()
    other = timm.create_model("crossformer_atto", groups=(3, 3, 3, 3), intervals=(8, 4, 2, 1))
    other.load_state_dict(state)

    mixer = other.stages[0].blocks[1].mixer.fn
    assert (mixer.group, mixer.interval) == (3, 8)
