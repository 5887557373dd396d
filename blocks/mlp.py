"""Channel mixers."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))` at every position of a feature map `[B, C, H, W]`, hidden width `ratio * C`."""

    def __init__(self, dim: int, *, ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.act(self.fc1(x.permute(0, 2, 3, 1))))
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
        y = self.fc1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.act(self.dwconv(y)).permute(0, 2, 3, 1)
        return self.fc2(y).permute(0, 3, 1, 2)
