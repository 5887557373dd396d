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
        and is_called_as_defined(layer)
        for layer in layers
    )


def is_called_as_defined(layer: nn.Module) -> bool:
    """Whether calling this layer runs the `forward` of its class and nothing else: no hooks, no replaced `forward`.

    Global hooks (`register_module_forward_hook`) are ignored. PyTorch's FlopCounterMode sets them, and if they counted,
    it would count other operations than those that run without it.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not (hooks or "forward" in layer.__dict__)
