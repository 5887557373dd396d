"""Depthwise convolutions: one, and two with an activation and batch norm between them."""

from torch import nn

from .residual import block


def depthwise(dim: int, *, kernel: int) -> nn.Conv2d:
    """Depthwise convolution `[B, C, H, W] -> [B, C, H, W]` with bias and zero padding, for odd kernels."""
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


def depthwise_pair(dim: int, *, kernel: int) -> nn.Sequential:
    """`conv2(norm(gelu(conv1(x))))`: `[B, C, H, W] -> [B, C, H, W]`, depthwise convolutions and batch norm.

    The local patch interaction of XCiT (El-Nouby et al., arXiv 2106.09681, sec. 3.4) with kernel 3; L2ViT has kernel 7.
    """
    return block(
        conv1=depthwise(dim, kernel=kernel),
        act=nn.GELU(),
        norm=nn.BatchNorm2d(dim),
        conv2=depthwise(dim, kernel=kernel),
    )
