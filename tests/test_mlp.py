"""Channel mixers, some images at a time."""

import pytest
import torch
from torch import nn

from tessel.blocks import ConvGlu, DepthwiseMlp, Mlp


def images_of_each_call(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each call of the layer adds its number of images; not by a hook, which prevents parts."""
    seen: list[int] = []
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: (seen.append(len(x)), forward(x))[1])
    return seen


@pytest.mark.parametrize("make", [Mlp, DepthwiseMlp, ConvGlu])
def test_images_are_computed_in_parts_without_gradients(make, monkeypatch):
    torch.manual_seed(0)
    model = make(6, ratio=3.0).double().eval()
    x = torch.randn(7, 6, 5, 3, dtype=torch.float64)
    expected = model(x).detach()
    seen = images_of_each_call(model.fc2, monkeypatch)
    monkeypatch.setattr(
        "tessel.blocks.mlp.PART_BYTES", 2 * 5 * 3 * model.fc2.in_features * 8 // torch.get_num_threads()
    )
    model(x)
    assert seen == [7], "with gradients the batch is computed at once"
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert seen[1:] == [2, 2, 2, 1]
    model.train()
    with torch.no_grad():
        model(x)
    assert seen[5:] == [7], "batch norm in training mode must see all images"


@pytest.mark.parametrize("make", [Mlp, DepthwiseMlp, ConvGlu])
def test_hooks_see_the_whole_batch(make, monkeypatch):
    model = make(6, ratio=3.0).eval()
    monkeypatch.setattr("tessel.blocks.mlp.PART_BYTES", 1)
    seen: list[int] = []
    [*model.children()][1].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        model(torch.randn(5, 6, 4, 4))
    assert seen == [5]
