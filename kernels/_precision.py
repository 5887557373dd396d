"""Where an operator must not compute in half precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which the device of `x` computes in the types it is given (the meta device knows no autocast)."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def at_least_float32(x: Tensor) -> torch.dtype:
    """The type of `x`, or float32 where that has fewer digits: what sums and statistics are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def unit(x: Tensor, *, dim: int) -> Tensor:
    """`x / max(|x|, 1e-12)` along `dim`, in at least float32."""
    x = x.to(at_least_float32(x))
    # the plain norm is slow where dim is not the last; the clamp stops the gradient of a zero vector, as it should
    return x * x.square().sum(dim, keepdim=True).clamp_min(1e-24).rsqrt()
