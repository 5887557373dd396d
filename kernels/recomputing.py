"""Computing a part again in the backward pass, where keeping what it needs would take too much memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from .recording import exporting, transformed


def recomputed(part: Callable, first: Tensor, *others: Any, above: int = 0) -> Any:
    """`part(first, *others)`, of which the backward pass keeps the arguments alone. `part` must have no side effect.

    An ordinary call where there is no backward pass, in a graph that is recorded, made by torch.fx or compiled (a
    compiler decides for itself what to keep), under torch.func, which cannot compute a part again, and where one image
    of `first: [B, ...]` has at most `above` bytes.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or exporting():
        return part(first, *others)
    if isinstance(first, Proxy) or transformed(first):
        return part(first, *others)
    if first.nbytes <= above * first.shape[0]:
        return part(first, *others)
    return checkpoint(part, first, *others, use_reentrant=False, preserve_rng_state=False)
