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


class DeepLocalAttention(EfficientLocalAttention):
    """`EfficientLocalAttention` with a second convolution: `a = sigmoid(conv2(relu(norm(conv(mean of x)))))`.

    The second convolution has the same groups, no bias, and a kernel of `second_kernel` (ELA84 in the released code).
    """

    def __init__(
        self, dim: int, *, kernel: int = 3, second_kernel: int = 5, groups: int | None = None, norm_groups: int = 32
    ):
        super().__init__(dim, kernel=kernel, groups=groups, norm_groups=norm_groups)
        if second_kernel < 1 or second_kernel % 2 == 0:
            raise ValueError(f"DeepLocalAttention: second_kernel={second_kernel} must be odd and positive")
        groups = self.conv.groups
        self.conv2 = nn.Conv1d(dim, dim, second_kernel, padding=second_kernel // 2, groups=groups, bias=False)

    def _weights(self, strip: Tensor) -> Tensor:
        return self.conv2(self.norm(self.conv(strip)).relu()).sigmoid()


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


class SubspaceGate(nn.Module):
    """One map of weights over the positions for each group of channels; `x: [B, C, H, W] -> [B, C, H, W]`.

        a = maxpool(relu(norm1(scale(x))))        p = softmax(relu(norm2(point(a))))        y = x + p * x

    with a depthwise 1x1 convolution `scale`, a 3x3 max pooling of stride 1, a 1x1 convolution `point` from each group
    to one map, and a softmax over all positions (ULSAM, arXiv 2006.15102, sec. 3; momentum as in the released code).

    Raises ValueError unless groups divides dim.
    """

    def __init__(self, dim: int, *, groups: int = 4):
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"SubspaceGate: dim={dim} must be divisible by groups={groups}")
        self.groups = groups
        self.scale = nn.Conv2d(dim, dim, 1, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim, momentum=0.9)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.point = nn.Conv2d(dim, groups, 1, groups=groups)
        self.norm2 = nn.BatchNorm2d(groups, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        a = self.pool(self.norm1(self.scale(x)).relu())
        p = self.norm2(self.point(a)).relu().flatten(2).softmax(-1).unflatten(2, x.shape[2:])
        by_group = x.unflatten(1, (self.groups, -1))
        return x + (by_group * p.unsqueeze(2)).flatten(1, 2)
