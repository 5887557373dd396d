"""Calls linear layers and 1x1 convolutions, or computes them by oneDNN where it is faster (kernels/linear.py)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.linear import onednn_linear, onednn_linear_gelu, takes_onednn
from ..kernels.recording import exporting, transformed
from .plain import is_called_as_defined, is_plain


def apply_linear(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)`, `[..., K] -> [..., M]`.

    Where oneDNN is faster and calling the layer does nothing but its product, the layer is not called.
    """
    if is_plain(layer) and takes_onednn(x, layer.weight, layer.bias):
        return onednn_linear(x, layer.weight, layer.bias)
    return layer(x)


def apply_linear_gelu(layer: Any, act: nn.Module, x: Tensor) -> Tensor:
    """`act(layer(x))`, `[..., K] -> [..., M]`; without gradients oneDNN computes both at once if `act` is the GELU."""
    is_gelu = type(act) is nn.GELU and act.approximate == "none" and is_called_as_defined(act)
    if is_gelu and not torch.is_grad_enabled() and is_plain(layer) and takes_onednn(x, layer.weight, layer.bias):
        return onednn_linear_gelu(x, layer.weight, layer.bias)
    return act(apply_linear(layer, x))


def apply_conv(conv: Any, x: Tensor) -> Tensor:
    """`conv(x)`, `[B, K, H, W] -> [B, M, H', W']`.

    Without gradients, a 1x1 convolution of a channels_last map is computed as a linear layer by oneDNN where that is
    faster. PyTorch would compute it by MKL, or by oneDNN's convolution, which copies the weight at every call.
    """
    if is_plain(conv) and _is_pointwise(conv, x) and not torch.is_grad_enabled():
        rows, columns = conv.stride
        pixels, weight = x[:, :, ::rows, ::columns].permute(0, 2, 3, 1), conv.weight.flatten(1)
        if takes_onednn(pixels, weight, conv.bias):
            return onednn_linear(pixels, weight, conv.bias).permute(0, 3, 1, 2)
    return conv(x)


def _is_pointwise(conv: Any, x: Tensor) -> bool:
    """Whether `conv` is a 1x1 convolution without groups and padding, and `x` is in the channels_last format."""
    return (
        isinstance(x, Tensor)  # not a proxy of torch.fx
        and not exporting()
        and not transformed(x)  # is_contiguous raises an error below torch.func.vmap
        and x.is_contiguous(memory_format=torch.channels_last)
        and conv.kernel_size == (1, 1)
        and conv.groups == 1
        and conv.padding == (0, 0)
    )
