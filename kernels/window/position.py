"""The bias of window attention: from a table of relative positions to a bias for each pair of pixels, and back.

Pixels of a window of h x w are numbered row by row. The dense bias is `[N, h * w, h * w]`, query by key. The table is
`[N, 2h - 1, 2w - 1]`, by row and by column of the query minus those of the key, counted from -(h - 1) and -(w - 1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tables import cache_tensors


def dense_bias(bias: Tensor, window: tuple[int, int]) -> Tensor:
    """The dense bias `[N, h * w, h * w]` of a table; a dense bias is returned as it is."""
    pixels = window[0] * window[1]
    if bias.shape[1:] == (pixels, pixels):
        return bias
    (index,) = _entries(*window, bias.device)
    # an embedding, since its gradient is a sum in a fixed order on a GPU too
    return F.embedding(index, bias.flatten(1).T).unflatten(0, (pixels, pixels)).permute(2, 0, 1)


def bias_gradient(gradient: Tensor, window: tuple[int, int], like: Tensor) -> Tensor:
    """The gradient of a bias of the shape of `like` from that of the dense bias; a sum in a fixed order."""
    height, width = window
    if like.shape == gradient.shape:
        return gradient
    pairs = gradient.view(-1, height, width, height, width).transpose(2, 3)
    columns = _sum_of_diagonals(pairs)  # [N, h, h, 2w - 1]
    return _sum_of_diagonals(columns.movedim(-1, 1)).transpose(1, 2).contiguous()


@cache_tensors
def _entries(height: int, width: int, device: torch.device) -> tuple[Tensor]:
    """The entry of the flat table for each pair of query and key, `[(h * w)**2]`."""
    pixel = torch.arange(height * width, device=device)
    y, x = pixel // width, pixel % width
    dy, dx = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    return ((dy * (2 * width - 1) + dx).flatten(),)


def _sum_of_diagonals(x: Tensor) -> Tensor:
    """`[..., n, n] -> [..., 2n - 1]`: entry i - j + n - 1 is the sum of all `x[..., i, j]`."""
    n = x.shape[-1]
    # rows of 2n, read as rows of 2n - 1: each row is one place further to the right than the row before
    skewed = F.pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return skewed.unflatten(-1, (n, 2 * n - 1)).sum(-2)
