"""Which layers may be computed without calling them."""

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(*layers: nn.Module) -> bool:
    """Whether calling these layers does nothing but their own product with their own weight.

    Only then may a mixer read the weights and compute the product in a faster way. Adapters (LoRA), quantized weights,
    parametrizations and hooks have an effect only if the layer is called.
    """
    return all(
        type(layer) in (nn.Linear, nn.Conv2d)
        and isinstance(layer.weight, nn.Parameter)
        and not is_traceable_wrapper_subclass(layer.weight)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        for layer in layers
    )
