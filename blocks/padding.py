"""Zero padding of feature maps to multiples of a window or region size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, rows: int, cols: int) -> Tensor:
    """Zero-pad `x: [B, H, W, C]` at the bottom and right to multiples of (rows, cols); `x` itself if it fits.

    While compiling or exporting the padding is always applied, also if it is empty, so that one graph serves all sizes.
    """
    height, width = x.shape[1:3]
    bottom = (height + rows - 1) // rows * rows - height
    right = (width + cols - 1) // cols * cols - width
    if torch.compiler.is_compiling() or bottom or right:
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    return x
