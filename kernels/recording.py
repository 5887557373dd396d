"""Whether a graph is being recorded, and what such a graph must not depend on.

torch.export and torch.jit.trace record one call of a model as a graph that other programs run. The graph must not
contain operators of this package, and must not depend on the value of a size that the graph leaves open.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad


def exporting() -> bool:
    """Whether a graph is recorded that runs without this package: by torch.export or by torch.jit.trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def transformed(x: Tensor) -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) acts on `x`, or forward-mode differentiation is active."""
    return not torch.compiler.is_compiling() and (is_functorch_wrapped_tensor(x) or forward_ad._current_level >= 0)


def is_open(size: int) -> bool:
    """Whether `size` is left open by the graph that torch.export records. A comparison of it would narrow the graph."""
    if torch.compiler.is_dynamo_compiling():  # a branch of `torch.cond`, where open sizes look like numbers
        return torch.compiler.is_exporting()
    return torch.compiler.is_exporting() and isinstance(size, torch.SymInt)


def compact(x: Tensor) -> Tensor:
    """`x`; while a graph is recorded a contiguous copy, which is reshaped without a look at the example's strides.

    Whether a transposed tensor can be reshaped without a copy depends on which sizes are 1, and a graph would keep the
    answer. ExecuTorch computes with other strides than the example's.
    """
    return x.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else x


def as_matrix(x: Tensor, rows: int, columns: int) -> Tensor:
    """The elements of `x` in their order as `[rows, columns]`.

    torch.export reshapes axis by axis, and where the example has an axis of 1 the graph keeps that. It does not do so
    for a matrix, nor while dividing an axis that has a known factor left.
    """
    return compact(x).reshape(-1).reshape(rows, columns)


def crop(x: Tensor, height: int, width: int, *, top: int = 0, left: int = 0) -> Tensor:
    """A part of a map `x: [B, H, W, ...]`, as `[B, height, width, ...]`."""
    if is_open(height) or is_open(width):
        # whether a slice is contiguous would be decided by the sizes of the example
        rows = torch.arange(height, device=x.device) + top
        columns = torch.arange(width, device=x.device) + left
        return x.index_select(1, rows).index_select(2, columns)
    return x[:, top : top + height, left : left + width]
