"""What decides how fast an attention operator runs, and the class of shapes it belongs to."""

from typing import NamedTuple

import torch
from torch import Tensor

# upper limits of the classes; more than the last is a class of its own
KEYS = (16, 64, 256, 1024)
QUERIES = (1 << 15, 1 << 19)


class Workload(NamedTuple):
    """One call of an operator.

    head_dim: width D of the queries and keys; keys: number of keys of a query; queries: number of queries of all heads
    and images; training: whether a backward pass may follow; bias: whether an optional bias is given.
    """

    head_dim: int
    keys: int
    queries: int
    dtype: torch.dtype
    training: bool
    bias: bool = False

    @property
    def shape_class(self) -> str:
        """Name of the class, for example `d32-k64-q32768`: head dim, limits of keys and queries; `-bias` with a bias.

        Sizes are only compared with the limits, so that torch.compile specializes a graph with open sizes on the class
        alone.
        """
        sizes = f"d{self.head_dim}-k{_limit(self.keys, KEYS)}-q{_limit(self.queries, QUERIES)}"
        return f"{sizes}-bias" if self.bias else sizes

    @property
    def direction(self) -> str:
        """`forward`, or `forward+backward` for training."""
        return "forward+backward" if self.training else "forward"


def workload(q: Tensor, *, queries: int, keys: int, bias: bool = False) -> Workload:
    """The workload of a call with the tensor `q: [..., D]`, which has the dtype and the device of the others."""
    return Workload(q.shape[-1], keys, queries, q.dtype, torch.is_grad_enabled() and q.requires_grad, bias)


def _limit(size: int, limits: tuple[int, ...]) -> str:
    return next((str(limit) for limit in limits if size <= limit), "more")
