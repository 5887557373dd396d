"""Rules for reduced precision: when to follow autocast, when to leave it, and which dtype to accumulate in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .recording import exporting, transformed

# device types with autocast (meta has none); looked up once, since torch.compile of torch 2.11 cannot trace the call
_AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "hpu", "mps", "mtia", "xla") if torch.amp.is_autocast_available(device)
)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `x`, or the autocast dtype of its device if autocast is on and `x` is not float64."""
    device = x.device.type
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def cast_to_autocast(x: Tensor) -> Tensor:
    """Cast `x` to the autocast dtype of its device if autocast is on. float64 tensors are returned as they are."""
    dtype = autocast_dtype(x)
    return x if dtype == x.dtype else x.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context that turns autocast off for the device of `x` (a no-op on devices without autocast: meta)."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in _AUTOCAST_DEVICES else nullcontext()


def acc_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for sums and statistics over `x`: its own, but at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2_normalize(x: Tensor, *, dim: int) -> Tensor:
    """Return `x / max(|x|, 1e-12)` along `dim`, in `acc_dtype(x)`; the shape stays."""
    x = x.to(acc_dtype(x))
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or exporting() or transformed(x):
        return x * _inverse_norm(x, dim)
    return _L2Normalize.apply(x, dim)


def _inverse_norm(x: Tensor, dim: int) -> Tensor:
    # F.normalize is slow if dim is not the last one. The clamp also stops the gradient of a zero vector.
    return x.square().sum(dim, keepdim=True).clamp_min(1e-24).rsqrt()


_LARGEST_SCALE = 0.999e12  # where the clamp acts the scale is a constant


class _L2Normalize(torch.autograd.Function):
    """y = x / |x|, with the backward (g - y (g y)) / |x|, fewer operations than autograd takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        scale = _inverse_norm(x, dim)
        y = x * scale
        ctx.save_for_backward(x, y, scale)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, y, scale = ctx.saved_tensors
        (g,) = gradients
        if torch.is_grad_enabled():  # for a second derivative
            x = x if x.requires_grad else x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(x * _inverse_norm(x, ctx.dim), x, g, create_graph=True)
            return dx, None
        along = (g * y).sum(ctx.dim, keepdim=True).masked_fill(scale > _LARGEST_SCALE, 0)
        return torch.addcmul(g, y, along, value=-1) * scale, None
