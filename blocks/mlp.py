"""Channel mixers."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.recomputing import recomputed
from .linear import apply_linear, apply_linear_gelu


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))` at every position of a feature map `[B, C, H, W]`, hidden width `ratio * C`."""

    def __init__(self, dim: int, *, ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = apply_linear(self.fc2, apply_linear_gelu(self.fc1, self.act, x.permute(0, 2, 3, 1)))
        return y.permute(0, 3, 1, 2)


class DepthwiseMlp(nn.Module):
    """`fc2(gelu(dwconv(fc1(x))))` on a feature map `[B, C, H, W]`: a 3x3 depthwise convolution on the hidden channels.

    Hidden width `ratio * C`, zero padding (Pan et al., arXiv 2205.13213; VAN, arXiv 2202.09741, has the same).
    """

    def __init__(self, dim: int, *, ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = apply_linear(self.fc1, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.act(self.dwconv(y)).permute(0, 2, 3, 1)
        return apply_linear(self.fc2, y).permute(0, 3, 1, 2)


# the gate of ConvGlu is computed again in the backward pass where one image's hidden map is larger than this: in
# dense prediction it takes more memory than the rest of a block
RECOMPUTE_BYTES = 8 << 20


class ConvGlu(nn.Module):
    """`fc2(norm(gelu(dwconv(gate(x))) * value(x)))`: `[B, C, H, W] -> [B, C, H, W]`, with a 3x3 depthwise convolution.

    The hidden width is int(2/3 * ratio * C) (Shi, arXiv 2311.17132, sec. 3, "convolutional GLU"). `norm(width)` makes a
    norm of maps of that width, as AttNet has it; by default there is none.
    """

    def __init__(self, dim: int, *, ratio: float, norm: Callable[[int], nn.Module] | None = None):
        super().__init__()
        hidden = int(2 * int(dim * ratio) / 3)
        # two layers instead of one that is split: the convolution would copy the strided half
        self.gate = nn.Linear(dim, hidden)
        self.value = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = nn.Identity() if norm is None else norm(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        gate, value = (apply_linear(layer, x).permute(0, 3, 1, 2) for layer in (self.gate, self.value))
        y = self.norm(recomputed(self._gated, gate, value, above=RECOMPUTE_BYTES))
        # only for a contiguous map the layer is a single operation
        return apply_linear(self.fc2, y.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    def _gated(self, gate: Tensor, value: Tensor) -> Tensor:
        return F.gelu(self.dwconv(gate)) * value
