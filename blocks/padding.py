"""Padding of feature maps to whole windows and regions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, rows: int, cols: int) -> Tensor:
    """Zeros at the bottom and right of `x: [B, H, W, C]` up to multiples of (rows, cols); `x` itself where it fits."""
    bottom, right = -x.shape[1] % rows, -x.shape[2] % cols
    # an exported graph must not depend on whether the example happened to fit
    if torch.compiler.is_exporting() or bottom or right:
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    return x
