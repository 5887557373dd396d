"""The call of a linear layer by the faster of the CPU's libraries (kernels/linear.py)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.linear import onednn_linear, onednn_linear_gelu, takes_onednn
from .plain import has_hooks, is_plain


def apply_linear(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)`, `[..., K] -> [..., M]`.

    Where oneDNN is faster and calling the layer does nothing but its product, the layer is not called.
    """
    if is_plain(layer) and takes_onednn(x, layer.weight):
        return onednn_linear(x, layer.weight, layer.bias)
    return layer(x)


def apply_linear_gelu(layer: Any, act: nn.Module, x: Tensor) -> Tensor:
    """`act(layer(x))`, `[..., K] -> [..., M]`; without gradients oneDNN computes both at once if `act` is the GELU."""
    is_gelu = type(act) is nn.GELU and act.approximate == "none" and not has_hooks(act)
    if is_gelu and not torch.is_grad_enabled() and is_plain(layer) and takes_onednn(x, layer.weight):
        return onednn_linear_gelu(x, layer.weight, layer.bias)
    return act(apply_linear(layer, x))
