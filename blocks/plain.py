"""Which layers may be computed without calling them."""

from torch import nn
from torch._subclasses import FakeTensor


def is_plain(*layers: nn.Module) -> bool:
    """Whether calling these layers does nothing but their own product with their own weight.

    Only then may a mixer read the weights and compute the product in a faster way. Adapters (LoRA), quantized weights,
    parametrizations and hooks have an effect only if the layer is called.
    """
    return all(
        type(layer) in (nn.Linear, nn.Conv2d)
        and type(layer.weight) in (nn.Parameter, FakeTensor)  # the latter stands for a parameter while exporting
        and not has_hooks(layer)
        for layer in layers
    )


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody is told when this layer is called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
