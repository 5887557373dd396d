"""Small gates: modules that multiply a map by weights computed from it, without an attention between tokens."""

import math

import torch
from torch import Tensor, nn

from ..kernels.precision import acc_dtype, without_autocast


class EfficientLocalAttention(nn.Module):
    """Weights for rows and for columns from strip means; `x: [B, C, H, W] -> [B, C, H, W]`.

        a = sigmoid(norm(conv(mean of x over the other axis)))        y = x * a_rows * a_columns

    One 1D convolution without bias and one group norm serve both axes (ELA, arXiv 2403.01123; the default is the
    setting of the released MobileNetV2).

    Raises ValueError for an even kernel and for groups that do not divide dim.
    """

    def __init__(self, dim: int, *, kernel: int = 7, groups: int | None = None, norm_groups: int = 16):
        super().__init__()
        groups = max(1, dim // 8) if groups is None else groups
        if dim % groups or dim % norm_groups:
            raise ValueError(
                f"EfficientLocalAttention: dim={dim} must be divisible by groups={groups} and norm_groups={norm_groups}"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"EfficientLocalAttention: kernel={kernel} must be odd and positive")
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.GroupNorm(norm_groups, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self._weights(x.mean(3))[..., None] * self._weights(x.mean(2))[:, :, None]

    def _weights(self, strip: Tensor) -> Tensor:
        return self.norm(self.conv(strip)).sigmoid()


class GaussianGate(nn.Module):
    """A product of Gaussians of the normalized channels of each head, as weights; `x: [B, C, H, W] -> [B, C, H, W]`.

    Each pixel alone, with mean m and unbiased variance v over the channels of a head:

        g = prod_k exp(-(x - m - offset_k)^2 / (2 v c_k^2)) / sqrt(2 pi c_k^2)        y = x * g / max(sum of g, 1e-8)

    (GAAM, arXiv 2401.11143). The weights of a head sum to 1, so y is small: the paper adds it to x. `offset` and `c`
    are `[num_heads, num_gaussians]`. Raises ValueError unless every head has the same number of channels, at least two.
    """

    def __init__(self, dim: int, *, num_heads: int = 4, num_gaussians: int = 5, eps: float = 1e-8):
        super().__init__()
        if num_heads < 1 or dim % num_heads or dim // num_heads < 2:
            raise ValueError(f"GaussianGate: dim={dim} must be num_heads={num_heads} times two or more")
        self.num_heads, self.eps = num_heads, eps
        self.offset = nn.Parameter(torch.empty(num_heads, num_gaussians))
        self.c = nn.Parameter(torch.empty(num_heads, num_gaussians))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.offset)
        with torch.no_grad():
            self.c.normal_().exp_()

    def forward(self, x: Tensor) -> Tensor:
        exact = acc_dtype(x)
        with without_autocast(x):
            heads = x.to(exact).unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)  # [B, H, W, heads, d]
            offset, c = self.offset.to(exact)[:, None], self.c.to(exact)[:, None]
            variance, mean = torch.var_mean(heads, -1, keepdim=True)
            distance = (heads - mean).unsqueeze(-1) - offset
            log = -distance.square() / (variance + self.eps).unsqueeze(-1) / (2 * c.square())
            g = (log.sum(-1) - 0.5 * (2 * math.pi * c.square()).log().sum(-1)).exp()
            y = heads * g / g.sum(-1, keepdim=True).clamp_min(self.eps)
            return y.flatten(3).permute(0, 3, 1, 2).to(x.dtype)
