"""Routed attention in plain PyTorch: the definition that all other forms are tested against.

Shapes: B images, H x W pixels in a grid of R = n_rows * n_cols equal regions of r pixels each, N heads of width D,
K routed regions per query region. Suffixes in this file: q_BRNrD is [B, R, N, r, D], j counts the K * r keys.

For query region i with routed regions I(i) and each head,

    y[p] = sum_j softmax_j(scale * q[p] . k[j]) v[j]        p in region i, j over the pixels of all regions in I(i)

(BiFormer, arXiv 2303.08810, eq. 5-6 and algorithm 1, without the local branch).
"""

from torch import Tensor

from ..precision import acc_dtype
from .regions import gather_regions, merge_regions, split_regions


def routed_attention_reference(qkv: Tensor, index: Tensor, *, grid: tuple[int, int], scale: float) -> Tensor:
    """Gather the routed keys and values, then ordinary attention; arguments as in `routed_attention`."""
    q_BRNrD, k_BRNrD, v_BRNrD = (split_regions(x, grid) for x in qkv.unbind(3))
    k_BRNjD, v_BRNjD = gather_regions(k_BRNrD, index), gather_regions(v_BRNrD, index)
    logits_BRNrj = (q_BRNrD * scale) @ k_BRNjD.transpose(-2, -1)
    p_BRNrj = logits_BRNrj.softmax(-1, dtype=acc_dtype(qkv)).to(qkv.dtype)
    return merge_regions(p_BRNrj @ v_BRNjD, grid, (qkv.shape[1], qkv.shape[2]))
