"""Weights of one image or window size in a model of another, by the rule of the code of Agent Attention."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tessel.train.recipe.schema import Model
from tessel.train.tasks.export import export_classifier
from tessel.train.tasks.models import load_initial_weights
from tessel.zoo import from_published, resized_weights, to_published

# model, arguments of the larger one, and how many weights have another shape in it
CASES = [
    ("agent_swin_atto", {"img_size": 384, "window": 12}, 3 * 4 + 3),
    ("agent_cswin_atto", {"img_size": 384, "stripe_widths": [1, 2, 12]}, 4 * 2),
    ("agent_deit_atto", {"img_size": 384}, 4 * 3 + 1),
    ("agent_pvt_atto", {"img_size": 320}, 4 * 4 + 4),
    ("inline_swin_atto", {"window": 12}, 3),
    ("inline_deit_atto", {"img_size": 288}, 1),
]


def linear(values, size):
    """The last axis resized linearly, each entry at the center of its cell."""
    flat = values.reshape(-1, values.shape[-1]).double().numpy()
    places = (np.arange(size) + 0.5) * flat.shape[1] / size - 0.5
    resized = np.stack([np.interp(places, np.arange(flat.shape[1]), row) for row in flat])
    return torch.from_numpy(resized).float().reshape(*values.shape[:-1], size)


def cubic(on_map, side):
    return F.interpolate(on_map[None], (side, side), mode="bicubic")[0]


def resized_as_published(state, shapes):
    """The rule of the authors, in their layout: by the ending of the name, to the shape in the larger model."""
    found = {}
    for name, tensor in state.items():
        shape = shapes[name]
        if tensor.shape == shape:
            found[name] = tensor
        elif name.endswith("ah_bias"):  # [1, heads, agents, H, 1]
            found[name] = linear(tensor[..., 0], shape[3])[..., None]
        elif name.endswith("aw_bias"):  # [1, heads, agents, 1, W]
            found[name] = linear(tensor, shape[4])
        elif name.endswith("ha_bias"):  # [1, heads, H, 1, agents]
            found[name] = linear(tensor.transpose(2, 4), shape[2]).transpose(2, 4)
        elif name.endswith("wa_bias"):  # [1, heads, 1, W, agents]
            found[name] = linear(tensor.transpose(3, 4), shape[3]).transpose(3, 4)
        elif name.endswith("relative_position_bias_table"):  # [(2 * window - 1) ** 2, heads]
            old, new = (round(n**0.5) for n in (tensor.shape[0], shape[0]))
            found[name] = cubic(tensor.T.reshape(-1, old, old), new).reshape(-1, new**2).T
        else:
            assert "pos_embed" in name  # [1, tokens, channels], in DeiT the class token first
            old, new = (int(n**0.5) for n in (tensor.shape[1], shape[1]))
            first, rest = tensor[:, : tensor.shape[1] - old**2], tensor[0, tensor.shape[1] - old**2 :]
            grown = cubic(rest.T.reshape(-1, old, old), new).reshape(-1, new**2).T
            found[name] = torch.cat([first, grown[None]], 1)
    return found


@pytest.mark.parametrize(("name", "options", "count"), CASES, ids=[case[0] for case in CASES])
def test_weights_of_another_size_are_resized_as_by_the_published_code(name, options, count, tmp_path):
    torch.manual_seed(0)
    small, large = timm.create_model(name), timm.create_model(name, **options)
    shapes = {key: tensor.shape for key, tensor in to_published(name, large.state_dict(), **options).items()}
    published = to_published(name, small.state_dict())
    wanted = from_published(name, resized_as_published(published, shapes), **options)
    own = large.state_dict()
    assert sum(own[key].shape != tensor.shape for key, tensor in small.state_dict().items()) == count

    large.load_state_dict(resized_weights(large, small.state_dict()))
    save_file({key: tensor.contiguous() for key, tensor in published.items()}, tmp_path / "small.safetensors")
    # by timm's own way: the arguments of the larger model, and the file of the smaller one
    overlay = {"file": str(tmp_path / "small.safetensors")}
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    for key, tensor in wanted.items():
        torch.testing.assert_close(large.state_dict()[key], tensor, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(loaded.state_dict()[key], tensor, msg=lambda text, key=key: f"{key}: {text}")
    side = options.get("img_size", 384)
    assert loaded.eval()(torch.randn(1, 3, side, side)).isfinite().all()


def test_fine_tuning_starts_from_an_export_of_another_size(tmp_path):
    """As the recipes at 384 pixels do."""
    torch.manual_seed(0)
    name = "agent_swin_atto"
    options: dict[str, Any] = {"img_size": 384, "window": 12}
    small = timm.create_model(name, num_classes=7)
    config = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    export_classifier(small, tmp_path / "export", classes=list("abcdefg"), data_config={**config, "crop_pct": 1.0})
    large = timm.create_model(name, num_classes=7, **options)
    load_initial_weights(large, Model(name=name, init_from=f"local-dir:{tmp_path}/export", kwargs=options), 384)
    wanted = resized_weights(large, small.state_dict())
    assert all(torch.equal(large.state_dict()[key], tensor) for key, tensor in wanted.items())


def test_weights_that_differ_in_more_than_the_size_are_refused():
    small = timm.create_model("agent_swin_atto")
    large = timm.create_model("agent_swin_atto", img_size=384, num_heads=[1, 2, 3, 3])
    state = resized_weights(large, small.state_dict())
    with pytest.raises(RuntimeError, match=r"stages\.3.*bias_table"):
        large.load_state_dict(state)
    more = timm.create_model("agent_swin_atto", img_size=384, agents=[16, 16, 49, 49])
    with pytest.raises(RuntimeError, match=r"stages\.0.*gather_bias\.rows"):
        more.load_state_dict(resized_weights(more, small.state_dict()))
