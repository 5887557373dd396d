"""Tables that follow the size of a map: how they are remembered, and a position bias kept as one."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor

Grid = tuple[int, int]

# table `[heads, n, m]`, rows `[keys_y, H]`, columns `[keys_x, W]`: the bias of the query (y, x) for the key (i, j) is
# table[:, rows[i, y], columns[j, x]]. Each row of an index array grows in steps of one size, the same for all of them.
BiasTable = tuple[Tensor, Tensor, Tensor]


def kept(make: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`make`, whose tables depend on nothing but its arguments (sizes, device, dtype), remembering the last ones."""

    @lru_cache(maxsize=64)
    def cached(*args):
        # a table made under inference mode could not serve a training step
        with torch.inference_mode(False), torch.no_grad():
            return make(*args)

    @wraps(make)
    def tables(*args):
        # what a tracer makes must not outlive the trace; under a fake mode even an empty tensor is of another type
        tracing = torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor
        return make(*args) if tracing else cached(*args)

    return tables


def expand(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The dense bias of a table, `[heads, keys_y, H, keys_x, W]`."""
    dense = table.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    return dense.unflatten(2, columns.shape).unflatten(1, rows.shape)
