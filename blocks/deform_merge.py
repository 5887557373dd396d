"""Deformable token merging (LITv1, LITv2): downsampling by a deformable convolution."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.linear import linear
from ..kernels.precision import acc_dtype, without_autocast
from ..kernels.recording import exporting


@register_notrace_module
class DeformableConv(nn.Module):
    """Deformable 2x2 convolution of stride 2; `x: [B, in_chs, H, W] -> [B, out_chs, H // 2, W // 2]`.

        y[p] = bias + sum_k weight[k] x(2 p + k + shift[p, k]),    shift = offset(x)

    over the kernel positions k in {0, 1}^2. x(.) is sampled bilinearly, zero outside the map. `offset` is an ordinary
    2x2 convolution of stride 2, initialized to zero, with channels (kernel row, kernel column, vertical or horizontal)
    (Dai et al., arXiv 1703.06211, eq. 2-4; Pan et al., arXiv 2105.14217, sec. 3.3). Sampling and convolution are
    computed in float32 or wider. Only shifted positions reach the last row or column of an odd side; a side of one
    pixel is zero-padded to two.

    `weight: [out_chs, 2, 2, in_chs]`.
    """

    def __init__(self, in_chs: int, out_chs: int):
        super().__init__()
        if in_chs < 1 or out_chs < 1:
            raise ValueError(f"DeformableConv: in_chs={in_chs} and out_chs={out_chs} must be at least 1")
        self.weight = nn.Parameter(torch.empty(out_chs, 2, 2, in_chs))
        self.bias = nn.Parameter(torch.empty(out_chs))
        self.offset = nn.Conv2d(in_chs, 8, 2, stride=2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The default initialization of torch's convolutions, and offsets of zero."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = (max(0, 2 - side) for side in x.shape[-2:])
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        dtype = acc_dtype(x)
        shift = self.offset(x).permute(0, 2, 3, 1).unflatten(-1, (2, 2, 2))
        with without_autocast(x):
            patches = _sample(x.permute(0, 2, 3, 1).to(dtype), shift.to(dtype))
            y = linear(patches.flatten(3), self.weight.flatten(1).to(dtype), self.bias.to(dtype))
        return y.to(x.dtype).permute(0, 3, 1, 2)


def deformable_merge(in_chs: int, out_chs: int) -> nn.Sequential:
    """Deformable convolution, batch norm, GELU: `[B, in_chs, H, W] -> [B, out_chs, H // 2, W // 2]`.

    Keys: `conv.*`, `norm.*` (Pan et al., arXiv 2105.14217, sec. 3.3).
    """
    return nn.Sequential(OrderedDict(conv=DeformableConv(in_chs, out_chs), norm=nn.BatchNorm2d(out_chs), act=nn.GELU()))


def _sample(x: Tensor, shift: Tensor) -> Tensor:
    """Sample the shifted 2x2 patches: `x: [B, H, W, C]`, `shift: [B, h, w, 2, 2, (y, x)] -> [B, h, w, 2, 2, C]`."""
    batch, height, width, chs = x.shape
    h, w = shift.shape[1:3]
    y_pos = shift[..., 0] + torch.arange(2 * h, device=x.device).view(h, 1, 2, 1)
    x_pos = shift[..., 1] + torch.arange(2 * w, device=x.device).view(w, 1, 2)
    # [B, P, 2] for the P samples of an image
    (row, row_weight), (col, col_weight) = (
        _neighbors(position.flatten(1), size) for position, size in ((y_pos, height), (x_pos, width))
    )
    image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1)
    index = (image * height + row[..., :, None]) * width + col[..., None, :]
    weight = row_weight[..., :, None] * col_weight[..., None, :]
    index, weight, pixels = index.flatten(2).flatten(0, 1), weight.flatten(2).flatten(0, 1), x.reshape(-1, chs)
    # a bilinear sample is a weighted sum of four pixels: one bag of four rows
    if exporting():
        # many runtimes have no `embedding_bag`
        samples = (pixels.index_select(0, index.flatten()).view(-1, 4, chs) * weight[..., None]).sum(1)
    else:
        samples = F.embedding_bag(index, pixels, mode="sum", per_sample_weights=weight)
    return samples.view(batch, h, w, 2, 2, chs)


def _neighbors(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two pixels next to each position on an axis, `[..., 2]`, and their linear weights, 0 outside the axis."""
    low = position.floor()
    fraction = position - low
    index = torch.stack([low, low + 1], -1).long()
    weight = torch.stack([1 - fraction, fraction], -1) * ((index >= 0) & (index < size))
    return index.clamp(0, size - 1), weight
