"""Large-kernel attention (VAN): a map multiplied by a convolution of itself with a large kernel."""

import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import depthwise
from .linear import apply_linear
from .registry import token_mixer


@token_mixer("large_kernel")
class LargeKernel(nn.Module):
    """Gating of a map by a large convolution of it, with a shortcut; `x: [B, C, H, W] -> [B, C, H, W]`.

    With u = gelu(proj_in(x)),

        y = proj_out(u * pointwise(dilated(local(u)))) + x

    where `local` is a depthwise convolution of `kernel` and `dilated` one of `dilated_kernel` with `dilation`; together
    they reach (kernel - 1 + dilation * (dilated_kernel - 1)) / 2 pixels to each side, by default 11 (Guo et al., arXiv
    2202.09741, sec. 3.1). There is no softmax. The shortcut of the mixer itself is that of the published code. The map
    is zero-padded on all sides.

    Raises ValueError for a kernel that is even or below 1, and for a dilation below 1.
    """

    def __init__(self, dim: int, *, kernel: int = 5, dilated_kernel: int = 7, dilation: int = 3):
        super().__init__()
        for name, side in (("kernel", kernel), ("dilated_kernel", dilated_kernel)):
            if side < 1 or side % 2 == 0:
                raise ValueError(f"LargeKernel: {name}={side} must be an odd number, so that the map keeps its size")
        if dilation < 1:
            raise ValueError(f"LargeKernel: dilation={dilation} must be at least 1")
        self.proj_in = nn.Linear(dim, dim)
        self.local = depthwise(dim, kernel=kernel)
        reach = dilation * (dilated_kernel // 2)
        self.dilated = nn.Conv2d(dim, dim, dilated_kernel, padding=reach, dilation=dilation, groups=dim)
        self.pointwise = nn.Linear(dim, dim)
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u = F.gelu(apply_linear(self.proj_in, x.permute(0, 2, 3, 1)))
        gate = self.dilated(self.local(u.permute(0, 3, 1, 2)))
        y = apply_linear(self.proj_out, u * apply_linear(self.pointwise, gate.permute(0, 2, 3, 1)))
        return y.permute(0, 3, 1, 2) + x
