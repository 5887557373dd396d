"""What follows from the size of the map and of the window alone."""

import torch
from torch import Tensor

from ..tables import Grid, cache_tensors


def window_side(pixels: int) -> int:
    """Return the side of a window of `pixels` pixels: the smallest odd number whose square is at least that."""
    side = 1
    while side**2 < pixels:  # math.isqrt of a symbolic size would break the graph
        side += 2
    return side


@cache_tensors
def border_mask(
    size: Grid, window: int, pooled_keys: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the mask of window pixels outside the map, and ln(number of keys) of each query.

    The mask is `[K, H, W]`, 0 inside the map and -inf outside. The second tensor is `[H * W]` and counts the window's
    pixels inside the map and the pooled keys.
    """
    inside = []
    for side in size:
        position = torch.arange(side, device=device) + torch.arange(window, device=device)[:, None] - window // 2
        inside.append((position >= 0) & (position < side))
    both = (inside[0][:, None, :, None] & inside[1][:, None]).flatten(0, 1)
    mask = torch.zeros(both.shape, device=device, dtype=dtype).masked_fill(~both, -torch.inf)
    keys = inside[0].sum(0)[:, None] * inside[1].sum(0) + pooled_keys
    return mask, keys.to(dtype).log().flatten()
