"""Weights of a model that was trained with another image or window size."""

from collections.abc import Mapping

from torch import Tensor, nn


def resized_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, with the weights whose shape depends on the size of images or windows resized to those of `model`.

    Layers with such weights have a method `resized_weight(name, weight)`, which interpolates by the rule of the
    published code. Weights that differ in anything else are returned as they are; loading them raises.
    """
    found = dict(state)
    for path, module in model.named_modules():
        resize = getattr(module, "resized_weight", None)
        if resize is None:
            continue
        for name, own in module.named_parameters(path, recurse=False):
            if name in found and found[name].shape != own.shape:
                found[name] = resize(name.rpartition(".")[2], found[name])
    return found
