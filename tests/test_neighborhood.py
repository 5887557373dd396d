"""Neighborhood attention against a loop over queries, and the families that are built of it."""

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from tessel import zoo
from tessel.blocks import NeighborhoodAttention
from tessel.kernels import neighborhood_attention
from tessel.kernels.neighborhood import reference
from tessel.zoo.dense import DenseBackbone


def neighbors(i: int, length: int, kernel: int, dilation: int) -> list[tuple[int, int]]:
    """The keys of the query `i` on an axis: their pixels, and their rows in the bias table."""
    pixels = list(range(i % dilation, length, dilation))
    place = pixels.index(i)
    start = min(max(place - kernel // 2, 0), len(pixels) - kernel)
    return [(pixels[t], t - place + kernel - 1) for t in range(start, start + kernel)]


def by_loops(qkv: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """The operator as a loop over pixels; arguments as in `neighborhood_attention`."""
    height, width, _, _, head_dim = qkv.shape[1:]
    kernel = (bias.shape[-1] + 1) // 2
    pixels = []
    for i in range(height):
        for j in range(width):
            rows, columns = neighbors(i, height, kernel, dilation), neighbors(j, width, kernel, dilation)
            keys = [(y, x, bias[:, b, c]) for y, b in rows for x, c in columns]
            logits = [(qkv[:, i, j, 0] * qkv[:, y, x, 1]).sum(-1) / head_dim**0.5 + extra for y, x, extra in keys]
            weights = torch.stack(logits).softmax(0)
            pixels.append(sum(w[..., None] * qkv[:, y, x, 2] for w, (y, x, _) in zip(weights, keys, strict=True)))
    return torch.stack(pixels, 1).unflatten(1, (height, width))


@settings(max_examples=12)
@given(
    kernel=st.sampled_from([1, 3, 5]),
    dilation=st.integers(1, 3),
    more=st.tuples(st.integers(0, 6), st.integers(0, 3)),
    chunk=st.sampled_from([1, 8 << 20]),
)
def test_operator_and_its_gradients_equal_the_loop(kernel, dilation, more, chunk):
    size = [kernel * dilation + extra for extra in more]
    qkv = torch.randn(2, *size, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2 * kernel - 1, 2 * kernel - 1, dtype=torch.float64, requires_grad=True)
    expected = by_loops(qkv, bias, dilation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CPU_CHUNK_BYTES", chunk)
        y = neighborhood_attention(qkv, bias, dilation=dilation)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, (qkv, bias), grad) for out in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (7, 2), (6, 9)], ids=str)
def test_small_maps_are_padded_before_the_projection(size):
    """Padding is not masked: its keys and values are the bias of `qkv`."""
    mixer = NeighborhoodAttention(8, num_heads=2, kernel_size=3, dilation=2).double()
    torch.nn.init.normal_(mixer.rpb)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    padded = x.new_zeros(2, *(max(side, 6) for side in size), 8)
    padded[:, : size[0], : size[1]] = x.permute(0, 2, 3, 1)
    y = by_loops(mixer.qkv(padded).unflatten(-1, (3, 2, 4)), mixer.rpb, 2)[:, : size[0], : size[1]]
    torch.testing.assert_close(mixer(x), mixer.proj(y.flatten(3)).permute(0, 3, 1, 2), rtol=1e-10, atol=1e-10)


def test_one_graph_serves_all_sizes():
    mixer = NeighborhoodAttention(4, num_heads=2, kernel_size=3, dilation=2).eval()
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    graph = torch.export.export(mixer, (torch.randn(2, 4, 9, 11),), dynamic_shapes=(sizes,)).module()
    # sides of more than one tile, which is what torch.export records
    for shape in [(1, 4, 7, 7), (3, 4, 8, 13), (2, 4, 9, 20)]:
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x), mixer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=16.*num_heads=3"),
        ({"num_heads": 2, "kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"num_heads": 2, "dilation": 0}, "dilation=0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(16, **arguments)


@pytest.mark.parametrize(
    ("qkv", "bias", "dilation", "message"),
    [
        ((1, 7, 7, 2, 2, 4), (2, 5, 5), 1, r"qkv must be .*\(1, 7, 7, 2, 2, 4\)"),
        ((1, 7, 7, 3, 2, 4), (1, 5, 5), 1, r"bias must be \[heads=2.*\(1, 5, 5\)"),
        ((1, 7, 7, 3, 2, 4), (2, 7, 7), 1, "K odd"),
        ((1, 7, 7, 3, 2, 4), (2, 5, 5), 0, "dilation=0"),
        ((1, 5, 7, 3, 2, 4), (2, 5, 5), 2, r"5 x 7 pixels is smaller than the window, K \* dilation = 6; pad it"),
    ],
)
def test_operator_errors(qkv, bias, dilation, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(torch.zeros(qkv), torch.zeros(bias), dilation=dilation)


def dilations(name: str, **options) -> list[list[int]]:
    model: Any = timm.create_model(name, device="meta", **options)
    return [[block.mixer.fn.dilation for block in stage.blocks] for stage in model.stages]


def test_dilations_of_the_published_models():
    assert dilations("nat_mini") == [[1] * 3, [1] * 4, [1] * 6, [1] * 5]
    assert dilations("dinat_mini") == [[1, 8, 1], [1, 4] * 2, [1, 2] * 3, [1] * 5]
    assert dilations("dinat_s_tiny") == [[1, 8], [1, 4], [1, 2] * 3, [1] * 2]
    for name in ("dinat_large_384", "dinat_s_large_384"):
        assert [max(stage) for stage in dilations(name)] == [13, 6, 3, 1]


def test_dilations_of_a_recipe_replace_those_of_the_model():
    pattern = [[1, 28], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]
    found = dilations("dinat_tiny", dilations=pattern)
    assert found == [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]
    with pytest.raises(ValueError, match="must have a list of at least one number for each stage"):
        dilations("dinat_s_tiny", dilations=[[1, 2], [1], [1]])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("nat_mini", 19_984_174),
        ("nat_tiny", 27_901_582),
        ("nat_small", 50_743_297),
        ("nat_base", 89_769_652),
        ("dinat_mini", 19_984_174),
        ("dinat_tiny", 27_901_582),
        ("dinat_small", 50_719_681),
        ("dinat_base", 89_769_652),
        ("dinat_large", 200_943_514),
        ("dinat_large_384", 200_943_514),
        ("dinat_s_tiny", 28_288_354),
        ("dinat_s_small", 49_606_258),
        ("dinat_s_base", 87_768_224),
        ("dinat_s_large", 196_532_476),
        ("dinat_s_large_384", 196_532_476),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == count


def test_kernel_size_11_of_the_large_model():
    model = timm.create_model("dinat_large_384", kernel_size=11, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 201_144_250


def test_patch_merging_has_the_published_order_of_pixels():
    model: Any = timm.create_model("dinat_s_atto")
    merge = model.stages[1].down.double()
    x = torch.randn(1, 24, 3, 5, dtype=torch.float64)
    patch = [x[0, :, row, 2 + column] for row, column in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    y = merge(x)
    assert y.shape == (1, 48, 2, 3)
    torch.testing.assert_close(y[0, :, 0, 1], merge.reduction(merge.norm(torch.cat(patch))))


@pytest.mark.parametrize("name", ["nat_atto", "dinat_atto", "dinat_s_atto"])
def test_files_in_the_published_layout_load(name, tmp_path):
    model = timm.create_model(name)
    state = zoo.to_published(name, {key: torch.randn_like(value) for key, value in model.state_dict().items()})
    stages = "layers" if name == "dinat_s_atto" else "levels"
    stem = "patch_embed.proj.weight" if name == "dinat_s_atto" else "patch_embed.proj.1.weight"
    scale = f"{stages}.0.blocks.0.gamma2"
    assert {stem, "norm.bias", f"{stages}.2.downsample.norm.weight", f"{stages}.3.blocks.0.attn.rpb"} <= state.keys()
    assert (scale in state) == (name == "nat_atto")
    torch.save(state, tmp_path / "published.pth")
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "published.pth")})
    again = zoo.to_published(name, loaded.state_dict())
    assert all(torch.equal(again[key], value) for key, value in state.items())
    dense: Any = DenseBackbone(name)
    segmenter = {f"backbone.{k}": v for k, v in state.items() if not k.startswith(("norm.", "head."))}
    segmenter |= {
        f"backbone.norm{i}.{p}": torch.randn(c) for i, c in enumerate(dense.channels) for p in ("weight", "bias")
    }
    dense.load_published(segmenter)
    assert torch.equal(dense.norms["2"].bias, segmenter["backbone.norm2.bias"])
