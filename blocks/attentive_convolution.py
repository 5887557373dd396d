"""Attentive convolution (AttNet): a depthwise convolution whose kernels are computed from the whole map."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.recording import exporting
from .linear import apply_linear
from .pooling import bin_weights
from .registry import token_mixer


@token_mixer("attentive_convolution")
@register_notrace_module
class AttentiveConvolution(nn.Module):
    """Depthwise convolution with a kernel of its own for every image and channel; `x: [B, C, H, W] -> [B, C, H, W]`.

    With n = kernel**2, `pool` averages the pixels in raster order over n consecutive bands, and with one matrix G of
    `kernel_gen`, [n, n], for all channels

        K = G gelu(pool(kernel_proj(x)))    [C, n]          K' = K - sigmoid(difference_control) * mean(K)
        y = proj(correlate(x_proj(x), K'))

    (Yu et al., arXiv 2510.20092, ATConv; the bands are those of the released code). K' is reshaped row by row to
    kernel x kernel; the map is zero-padded. Both linear maps commute with the mean, so the map is pooled first and
    `kernel_proj` is applied to n pixels.

    Raises ValueError if kernel is not odd.
    """

    def __init__(self, dim: int, *, kernel: int = 3):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"AttentiveConvolution: kernel={kernel} must be odd and positive")
        self.kernel = kernel
        self.kernel_proj = nn.Linear(dim, dim)
        self.kernel_gen = nn.Linear(kernel**2, kernel**2)
        self.difference_control = nn.Parameter(torch.empty(dim))
        self.x_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.difference_control)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        values = apply_linear(self.x_proj, x)
        y = correlate(values, self.kernels(x).to(values.dtype), self.kernel)
        return apply_linear(self.proj, y).permute(0, 3, 1, 2)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels of a map `[B, H, W, C]`, as `[B, C, kernel**2]`."""
        tokens = x.flatten(1, 2)
        pooled = bin_weights(tokens.shape[1], self.kernel**2, x) @ tokens
        kernels = self.kernel_gen(F.gelu(self.kernel_proj(pooled)).transpose(1, 2))
        # scaled before the mean: OpenVINO computes a mean that is scaled afterwards wrongly (docs/upstream.md)
        scaled = self.difference_control.sigmoid()[:, None] * kernels
        return kernels - scaled.mean(-1, keepdim=True)


def correlate(x: Tensor, kernels: Tensor, side: int) -> Tensor:
    """Depthwise correlation of each image `[H, W, C]` with its own kernels: `x: [B, H, W, C]`, `[B, C, side*side]`."""
    # a convolution needs a fixed number of groups, which here depends on the batch size
    by_shifts = torch.compiler.is_compiling() or exporting()
    return (correlate_by_shifts if by_shifts else correlate_by_groups)(x, kernels, side)


def correlate_by_groups(x: Tensor, kernels: Tensor, side: int) -> Tensor:
    """`correlate` as a convolution of B*C groups."""
    batch, height, width, dim = x.shape
    if x.device.type == "cpu":
        # the images become channels of one map, channels last: transposing the map took longer than convolving it
        maps = x.permute(1, 2, 0, 3).reshape(1, height, width, batch * dim).permute(0, 3, 1, 2)
    else:
        maps = x.permute(0, 3, 1, 2).reshape(1, batch * dim, height, width)
    y = F.conv2d(maps, kernels.reshape(batch * dim, 1, side, side), padding=side // 2, groups=batch * dim)
    return y[0].unflatten(0, (batch, dim)).permute(0, 2, 3, 1)


def correlate_by_shifts(x: Tensor, kernels: Tensor, side: int) -> Tensor:
    """The same as a sum of shifted maps, for graphs that leave the batch size open."""
    height, width = x.shape[1:3]
    margin = side // 2
    padded = F.pad(x, (0, 0, margin, margin, margin, margin))
    y = torch.zeros_like(x)
    for i, tap in enumerate(kernels.unsqueeze(1).unsqueeze(1).unbind(-1)):
        top, left = divmod(i, side)
        y = y + padded[:, top : top + height, left : left + width] * tap
    return y
