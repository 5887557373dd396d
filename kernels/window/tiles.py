"""Sizes of a call, and the one decision about tiles that is needed without Triton, to know what is saved."""

from typing import NamedTuple


class Case(NamedTuple):
    """Sizes of a call. bias: `none`, `table` or `dense`; batch, size (H, W), heads and head_dim are those of qkv."""

    batch: int
    size: tuple[int, int]
    heads: int
    head_dim: int
    windows: tuple[tuple[int, int], ...]
    lepe: bool = False
    bias: str = "none"
    stride: int = 1
    start: int | None = None


def fits_one_tile(pixels: int) -> bool:
    """Whether a window of `pixels` pixels fits one tile. Its backward then recomputes lse."""
    return pixels <= 128
