"""Strided convolution and norm, for stems and for downsampling between stages."""

from collections.abc import Callable

from torch import nn


def conv_norm(
    in_chs: int,
    out_chs: int,
    *,
    kernel: int,
    stride: int,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """Convolution with bias and a padding of `kernel // 2`, then `norm(out_chs)`.

    `[B, in_chs, H, W] -> [B, out_chs, ceil(H / stride), ceil(W / stride)]` for odd kernels. Keys: `conv.*`, `norm.*`.
    """
    layer = nn.Sequential()
    layer.add_module("conv", nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2))
    layer.add_module("norm", norm(out_chs))
    return layer
