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
