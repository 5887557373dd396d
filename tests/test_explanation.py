"""What mixers explain of themselves: attention weights, gates, receptive fields, and `tessel explain`."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import tessel.zoo
from tessel.blocks import (
    MIXERS,
    AdaptiveFrequencyFilter,
    BiLevelRouting,
    Channel,
    CrossShapedWindow,
    FullAttention,
    HiLo,
    Place,
    Window,
    explain,
    receptive_field,
)
from tessel.blocks.registry import token_mixers
from tessel.cli import main

every_mixer = pytest.mark.parametrize("name", sorted(MIXERS))


def drawn(module):
    """The module with weights that are far from uniform."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def softmax_weights(mixer, x):
    """The attention weights [heads, positions, positions] of a mixer with `qkv` among all positions."""
    q, k, _ = mixer.qkv(x.permute(0, 2, 3, 1)).unflatten(-1, (3, mixer.num_heads, -1))[0].flatten(0, 1).unbind(1)
    return (q.transpose(0, 1) @ k.permute(1, 2, 0) / math.sqrt(q.shape[-1])).softmax(-1)


@every_mixer
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), stride=st.sampled_from([4, 8, 16, 32]))
def test_every_mixer_explains_maps_of_any_size(name, size, stride):
    mixer = MIXERS[name].make(Place(24, stride)).eval()
    x, query = torch.randn(1, 24, *size), (size[0] - 1, size[1] // 2)
    explanation = explain(mixer, x, query)
    values = explanation.values
    assert values.isfinite().all() and not values.requires_grad and explanation.text
    assert values.shape == ((24, 24) if explanation.over == "channels" else size)
    if explanation.over == "positions" and name != "linear_global":
        assert values.sum() <= 1 + 1e-4 or name == "aggregated"


@every_mixer
def test_the_query_takes_nothing_from_where_its_output_does_not_depend_on(name):
    mixer = drawn(MIXERS[name].make(Place(24, 8))).double()
    x, query = torch.randn(1, 24, 17, 19).double(), (8, 4)
    explanation = explain(mixer, x, query)
    if explanation.over == "positions":
        reached = receptive_field(mixer, x, query).values > 0
        assert explanation.values[reached].abs().sum() > 0 and not explanation.values[~reached].any()


def test_full_attention_shows_its_weights():
    mixer, x = drawn(FullAttention(8, num_heads=2)), torch.randn(1, 8, 5, 7)
    expected = softmax_weights(mixer, x).mean(0)[3 * 7 + 2].unflatten(0, (5, 7))
    torch.testing.assert_close(explain(mixer, x, (3, 2)).values, expected)


def test_windows_and_stripes_show_their_reach():
    x = torch.randn(1, 8, 9, 10)
    window = explain(drawn(Window(8, num_heads=2, window=4)), x, (5, 9)).values
    assert window.nonzero().tolist() == [[row, column] for row in range(4, 8) for column in (8, 9)]
    stripes = explain(drawn(CrossShapedWindow(8, num_heads=2, stripe_width=1)), x, (5, 9)).values
    reach = torch.zeros(9, 10, dtype=torch.bool)
    reach[5], reach[:, 9] = True, True
    assert torch.equal(stripes > 0, reach) and stripes.sum() == pytest.approx(1)


def test_routing_shows_its_regions():
    mixer, x = drawn(BiLevelRouting(8, num_heads=2, n_win=4, topk=3)), torch.randn(1, 8, 8, 12)
    explanation = explain(mixer, x, (3, 10))
    regions = (explanation.values > 0).unflatten(1, (4, 3)).unflatten(0, (4, 2)).any(3).any(1).flatten()
    assert set(regions.nonzero().flatten().tolist()) == set(mixer.route(x)[0, 1 * 4 + 3].tolist())
    assert explanation.text == "3 of 16 regions" and explanation.values.sum() == pytest.approx(1)


def test_weights_of_pooled_positions_are_divided_among_their_pixels():
    mixer, x = drawn(HiLo(8, num_heads=2, window=2, alpha=1.0)), torch.randn(1, 8, 6, 8)
    values = explain(mixer, x, (0, 0)).values
    cells = values.unflatten(1, (4, 2)).unflatten(0, (3, 2))
    torch.testing.assert_close(cells, cells[:, :1, :, :1].expand(3, 2, 4, 2))
    assert values.sum() == pytest.approx(1)


def test_channels_and_frequencies_show_their_gates():
    mixer, x = drawn(Channel(8, num_heads=2)), torch.randn(1, 8, 4, 5)
    kv = mixer.qkv(x.permute(0, 2, 3, 1).flatten(1, 2))[..., 8:]
    values = explain(mixer, x, (0, 0)).values
    torch.testing.assert_close(values[4:, 4:], mixer.attention(kv)[0, 1])
    assert not values[:4, 4:].any() and not values[4:, :4].any()
    for width in (5, 6):
        mixer, x = drawn(AdaptiveFrequencyFilter(8, num_groups=2)), torch.randn(1, 8, 4, width)
        spectrum = torch.fft.rfft2(x, norm="ortho")
        filtered = torch.complex(*mixer.filtered(torch.view_as_real(spectrum)))
        mask = torch.fft.ifftshift(explain(mixer, x, (0, 0)).values)
        torch.testing.assert_close(
            mask[:, : width // 2 + 1], (filtered / spectrum).abs()[0].mean(0), rtol=1e-3, atol=1e-4
        )
        # the mask of a real signal is symmetric
        mirrored = mask.roll((-1, -1), (0, 1)).flip(0, 1)
        torch.testing.assert_close(mask[:, 1 : (width + 1) // 2], mirrored[:, 1 : (width + 1) // 2])


def test_other_mixers_show_their_receptive_field():
    x = torch.randn(1, 6, 9, 9)
    explanation = explain(nn.Conv2d(6, 6, 3, padding=1, groups=6), x, (4, 0))
    assert explanation.text == "receptive field" and explanation.values.sum() == pytest.approx(1)
    assert explanation.values.nonzero().tolist() == [[row, column] for row in (3, 4, 5) for column in (0, 1)]


@pytest.fixture
def photo(tmp_path):
    Image.effect_noise((80, 60), 50).convert("RGB").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_the_command_draws_a_picture(photo, tmp_path):
    mixers = ["tessel_lab_atto", "--image", photo, "--random", "--size", "64", "--out", str(tmp_path / "out.png")]
    widths = []
    for query in ([], ["--query", "0.5", "1"]):
        assert main(["explain", *mixers, *query]) == 0
        with Image.open(tmp_path / "out.png") as picture:
            widths.append(picture.width)
    assert widths[1] < 0.7 * widths[0]


def test_models_without_mixers_and_missing_images_are_errors(photo, tmp_path, capsys):
    assert main(["explain", "test_resnet", "--image", photo, "--random"]) == 1
    assert "test_resnet has no token mixer of tessel" in capsys.readouterr().err
    assert main(["explain", "cswin_atto", "--image", str(tmp_path / "none.png"), "--random"]) == 1
    assert "none.png" in capsys.readouterr().err


def test_every_mixer_of_the_table_and_of_the_zoo_is_registered():
    """A mixer that is not in `MIXERS` would be missing from the lab, and its models from `swap`."""
    page = (Path(tessel.__file__).parent / "docs" / "mixers.md").read_text()
    named = set(re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE))
    assert named == {mixer.kind.__name__ for mixer in MIXERS.values()}
    for name in [name for name in tessel.zoo.list_models() if name.endswith("_atto")]:
        assert token_mixers(timm.create_model(name, device="meta")), name
