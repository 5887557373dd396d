"""Routed attention in plain PyTorch: the definition that all other forms are tested against.

Shapes: B images, H x W pixels in a grid of R = n_rows * n_cols equal regions of r pixels each, N heads of width D,
K routed regions per query region. Suffixes in this file: q_BRNrD is [B, R, N, r, D], j counts the K * r keys.

For query region i with routed regions I(i) and each head,

    y[p] = sum_j softmax_j(scale * q[p] . k[j]) v[j]        p in region i, j over the pixels of all regions in I(i)

(BiFormer, arXiv 2303.08810, eq. 5-6 and algorithm 1, without the local branch).
"""

import torch
from torch import Tensor

from ..precision import acc_dtype
from ..recording import as_matrix
from .regions import gather_regions, merge_regions, split_regions


def routed_attention_reference(qkv: Tensor, index: Tensor, *, grid: tuple[int, int], scale: float) -> Tensor:
    """Gather the routed keys and values, then ordinary attention; arguments as in `routed_attention`."""
    q_BRNrD, k_BRNrD, v_BRNrD = (split_regions(x, grid) for x in qkv.unbind(3))
    k_BRNjD, v_BRNjD = gather_regions(k_BRNrD, index), gather_regions(v_BRNrD, index)
    logits = torch.bmm(_as_batch(q_BRNrD * scale), _as_batch(k_BRNjD).transpose(1, 2))
    p = logits.softmax(-1, dtype=acc_dtype(qkv)).to(qkv.dtype)
    y = torch.bmm(p, _as_batch(v_BRNjD))
    batch, regions, heads, pixels, head_dim = q_BRNrD.shape
    y_BRNrD = as_matrix(y, batch * regions * heads, pixels * head_dim).reshape(batch, regions, heads, pixels, head_dim)
    return merge_regions(y_BRNrD, grid, (qkv.shape[1], qkv.shape[2]))


def _as_batch(x: Tensor) -> Tensor:
    """`[B, R, N, r, D] -> [B*R*N, r, D]`: matmul of more axes would keep in a graph whether the example has r = 1."""
    batch, regions, heads, pixels, head_dim = x.shape
    matrix = as_matrix(x, batch * regions * heads, pixels * head_dim)
    return matrix.reshape(batch * regions * heads, pixels, head_dim)
