"""Strided convolutions, for stems and for downsampling between stages; learned position embeddings."""

from collections.abc import Callable, Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
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

    After the norm, a row or column of zeros is added to an odd side (DaViT, L2ViT).
    """

    def __init__(self, in_chs: int, out_chs: int, *, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm = norm(in_chs)
        self.conv = nn.Conv2d(in_chs, out_chs, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(self.norm(x).permute(0, 2, 3, 1), 2, 2)
        return self.conv(x.permute(0, 3, 1, 2))


class CrossScale(nn.Module):
    """Convolutions of several kernels and one stride, concatenated; `[B, in_chs, H, W] -> [B, out_chs, ~H/s, ~W/s]`.

    The larger a kernel, the fewer its channels: out_chs / 2, out_chs / 4 and so on; the last two have equally many
    (Wang et al., arXiv 2108.00154, sec. 3.1). Kernels are centered on their cell of stride x stride pixels; sides are
    rounded down.

    Raises ValueError for kernels that cannot be centered or that are not in rising order, and if out_chs is not
    divisible by the smallest share.
    """

    def __init__(self, in_chs: int, out_chs: int, *, kernels: Sequence[int], stride: int):
        super().__init__()
        if list(kernels) != sorted(kernels) or any(k < stride or (k - stride) % 2 for k in kernels):
            raise ValueError(
                f"CrossScale: kernels={tuple(kernels)} must rise and exceed stride={stride} by even numbers"
            )
        shares = [2 ** min(i, len(kernels) - 1) for i in range(1, len(kernels) + 1)]
        if out_chs % shares[-1]:
            raise ValueError(f"CrossScale: out_chs={out_chs} must be divisible by {shares[-1]}")
        self.convs = nn.ModuleList(
            nn.Conv2d(in_chs, out_chs // share, kernel, stride, (kernel - stride) // 2)
            for kernel, share in zip(kernels, shares, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


class PositionEmbedding(nn.Module):
    """Add a learned vector to each position of `[B, dim, H, W]`.

    The vectors are those of a map of `trained_size` x `trained_size` pixels, row by row; for other maps they are
    resized by `mode` of `F.interpolate`.
    """

    def __init__(self, dim: int, *, trained_size: int, mode: str = "bilinear"):
        super().__init__()
        self.trained_size, self.mode = trained_size, mode
        self.table = nn.Parameter(torch.empty(1, trained_size**2, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        on_map = self.table.unflatten(1, (self.trained_size, self.trained_size)).permute(0, 3, 1, 2)
        return x + F.interpolate(on_map, x.shape[2:], mode=self.mode)

    def resized_weight(self, name: str, weight: Tensor) -> Tensor:
        """The table of another `trained_size`, resized bicubically to ours, as the published fine-tuning does."""
        side = isqrt(weight.shape[1]) if weight.ndim == 3 else 0
        if side**2 != weight.shape[1] or weight.shape[::2] != self.table.shape[::2]:
            return weight
        on_map = weight.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        size = (self.trained_size, self.trained_size)
        return F.interpolate(on_map, size, mode="bicubic").flatten(2).transpose(1, 2)
