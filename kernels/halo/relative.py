"""Relative-position logits as the Triton kernels read them: each query times the table rows its block can reach."""

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_columns(window: int, side: int) -> int:
    """Return how many table rows the queries of a block can reach, rounded up to 4 to keep matrix products aligned.

    `window` is K, `side` the number of query rows (or columns) of a block.
    """
    return -(-(window + side - 1) // 4) * 4


def reachable_logits(q: Tensor, height_rel: Tensor, width_rel: Tensor, side: int) -> Tensor:
    """Multiply q `[B, Hq, Wq, N, D]` with the reachable rows of both tables: `[B, Hq, Wq, N, 2, columns]`.

    Column j - i + side - 1 belongs to row (or column) j of the window and row (or column) i of the block. This is one
    matrix product for both tables and all i; the kernels select K of the columns when they load.
    """
    window = (height_rel.shape[0] + 1) // 2
    reach = window + side - 1
    tables = torch.stack((height_rel, width_rel))[:, -reach:]
    tables = F.pad(tables, (0, 0, 0, relative_columns(window, side) - reach))
    return (q @ tables.flatten(0, 1).mT).unflatten(-1, (2, -1))
