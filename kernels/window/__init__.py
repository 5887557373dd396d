"""Window attention (CSWin, DaViT, LITv2, Swin, CrossFormer): every pixel attends to the pixels of its window."""

from .functional import CASES, window_attention, window_attention_unsupported, window_kernels_run
from .reference import window_attention_reference

__all__ = [
    "CASES",
    "window_attention",
    "window_attention_reference",
    "window_attention_unsupported",
    "window_kernels_run",
]
