"""Caching for tensors that depend only on the feature-map size, and the factorized position-bias table."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey

from .recording import exporting

Grid = tuple[int, int]

# (table `[heads, n, m]`, rows `[keys_y, H]`, columns `[keys_x, W]`). The bias of the query (y, x) for the key (i, j) is
# table[:, rows[i, y], columns[j, x]]. Every row of `rows` is an arithmetic progression, all with the same step, and so
# is every row of `columns`: the Triton kernels compute offsets from the first entry and the step.
BiasTable = tuple[Tensor, Tensor, Tensor]


def cache_tensors(make: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Decorator: cache the tensors that `make(*args)` returns, the 64 most recent results.

    The result of `make` must depend on nothing but its (hashable) arguments: sizes, device, dtype. The cache is
    bypassed while a graph is traced and under a fake-tensor mode.
    """

    @lru_cache(maxsize=64)
    def cached(*args):
        # a tensor created in inference mode cannot be used in a later training step
        with torch.inference_mode(False), torch.no_grad():
            return make(*args)

    @wraps(make)
    def tensors(*args):
        # tensors of a tracer must not outlive the trace, nor those of a fake mode
        tracing = torch.compiler.is_compiling() or exporting() or _get_dispatch_mode(_TorchDispatchModeKey.FAKE)
        return make(*args) if tracing else cached(*args)

    return tensors


def expand_bias(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the dense bias of a `BiasTable`, `[heads, keys_y, H, keys_x, W]`."""
    dense = table.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    return dense.unflatten(2, columns.shape).unflatten(1, rows.shape)
