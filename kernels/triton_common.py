"""Triton functions that the kernels of all operators share, and the description of a kernel launch.

Names follow FlashAttention: m_i and l_i are the running row maximum and row sum of the online softmax, alpha rescales
what was accumulated under an older maximum, acc is the unnormalized output, lse = m_i + log2(l_i) is saved for the
backward. Logits `s` are in base 2: softmax(x) = exp2(s - lse) with s = x * log2(e). `offs_m` and `mask_m` belong to
queries, `offs_n` and `mask_n` to keys, `offs_d` to channels.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LOG2_E_CONSTEXPR = tl.constexpr(LOG2_E)  # for use inside kernels


class KernelSpec(NamedTuple):
    """One kernel with its compile-time constants: what an operator launches, and what is compiled ahead of time."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3


def padded_dim(size: int) -> int:
    """Return the power of two to which an axis of a matrix product is padded: at least 16, as `tl.dot` demands."""
    return max(16, triton.next_power_of_2(size))


@triton.constexpr_function
def acc_dtype_of(dtype):
    """The dtype of accumulators for inputs of `dtype`: float32, or float64 for float64 (in the interpreter)."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def split_program_id(heads, blocks):
    """Split the flat program id into (outer index, block, head).

    The head varies fastest, so that programs that run at the same time share the cache lines of a pixel.
    """
    pid = tl.program_id(0)
    outer = pid // heads
    return outer // blocks, outer % blocks, pid % heads


@triton.jit
def dot(a, b, INTERPRET: tl.constexpr):
    """`a @ b`, accumulated in float32 (float64 for float64 operands)."""
    if INTERPRET:  # NumPy has no bfloat16
        a = a.to(tl.float32) if a.dtype == tl.bfloat16 else a
        b = b.to(tl.float32) if b.dtype == tl.bfloat16 else b
    out_dtype: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return tl.dot(a, b, input_precision="ieee", out_dtype=out_dtype)


@triton.jit
def load_rows(ptr, offs, mask, row_stride, D: tl.constexpr, PAD_D: tl.constexpr):
    """Load rows of D channels, `[len(offs), PAD_D]`; 0 in masked rows and in channels from D on."""
    offs_d = tl.arange(0, PAD_D)
    ptrs = ptr + offs[:, None] * row_stride + offs_d[None, :]
    return tl.load(ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, offs, mask, row_stride, x, D: tl.constexpr, PAD_D: tl.constexpr):
    """Store the rows of `x` `[len(offs), PAD_D]`, cast to the pointer's dtype: the inverse of `load_rows`."""
    offs_d = tl.arange(0, PAD_D)
    ptrs = ptr + offs[:, None] * row_stride + offs_d[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < D)[None, :])


@triton.jit
def online_softmax_step(m_i, l_i, acc, s, v, INTERPRET: tl.constexpr):
    """Add one block of keys: base-2 logits `s` `[M, N]` (-inf if masked) and values `v` `[N, E]`."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + dot(p.to(v.dtype), v, INTERPRET)
    return m_new, l_i, acc


@triton.jit
def dkdv_step(dk, dv, p, q, v, do, delta, INTERPRET: tl.constexpr):
    """Add what one block of queries contributes to dk and dv of a block of keys; `p` is P^T, `[N, M]`.

    dk still lacks the factor `scale`. dS^T is computed as a product of its own, since some versions of Triton return
    wrong values on Hopper if a product is transposed.
    """
    dv += dot(p.to(do.dtype), do, INTERPRET)
    ds = p * (dot(v, tl.trans(do), INTERPRET) - delta[None, :])
    dk += dot(ds.to(q.dtype), q, INTERPRET)
    return dk, dv
