"""Strided convolution and norm, for stems and for downsampling between stages."""

from collections.abc import Callable

from timm.layers import register_notrace_module
from torch import Tensor, nn

from .padding import pad_to_multiple


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


@register_notrace_module
class NormMerge(nn.Module):
    """Norm, then a 2x2 convolution of stride 2: `[B, in_chs, H, W] -> [B, out_chs, ceil(H / 2), ceil(W / 2)]`.

    Odd sides are padded with a row or column of zeros between the two (DaViT, L2ViT).
    """

    def __init__(self, in_chs: int, out_chs: int, *, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm = norm(in_chs)
        self.conv = nn.Conv2d(in_chs, out_chs, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(self.norm(x).permute(0, 2, 3, 1), 2, 2)
        return self.conv(x.permute(0, 3, 1, 2))
