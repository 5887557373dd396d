"""What every operator file shares: the operator library and the choice of a backend."""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")

# operators whose Triton kernel was verified and timed on a GPU by benchmarks/kernels.py: `auto` takes no other
VERIFIED: frozenset[str] = frozenset()

library = torch.library.Library("tessel", "DEF")

# read once: a variable that changes under a compiled graph would be ignored without a word
_default_backend = os.environ.get("TESSEL_KERNELS", "auto")
_interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreting() -> bool:
    """Whether Triton runs in its CPU interpreter, where CPU tensors count as supported."""
    return _interpreting


def choose_backend(name: str, backend: str | None, reasons: Sequence[str]) -> str:
    """Resolve `backend` for the operator `name` to `triton`, `reference` or `auto` (plain PyTorch, least memory).

    `reasons` says why the Triton kernel cannot run. Raises ValueError for an unknown backend and RuntimeError, with
    every reason, where `triton` was asked for and cannot run.
    """
    backend = _default_backend if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "triton" and reasons:
        raise RuntimeError(f"{name}: the Triton kernel cannot run here: {'; '.join(reasons)}")
    if backend == "auto" and name in VERIFIED and not reasons:
        return "triton"
    return backend


def common_reasons(tensor: Tensor, *, head_dim: int) -> list[str]:
    """Reasons against a Triton kernel that hold for every operator."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if interpreting():
        supported = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    else:
        supported = (torch.float16, torch.bfloat16)
        if tensor.device.type != "cuda":
            reasons.append(f"device={tensor.device.type} is not cuda")
        elif torch.cuda.get_device_capability(tensor.device) < (8, 0):
            reasons.append(f"compute capability {torch.cuda.get_device_capability(tensor.device)} is below (8, 0)")
    if tensor.dtype not in supported:
        reasons.append(f"dtype={str(tensor.dtype).removeprefix('torch.')} is not float16 or bfloat16")
    if head_dim % 8 or head_dim > 128:
        reasons.append(f"head_dim={head_dim} is not a multiple of 8 up to 128")
    return reasons


def autocast(tensor: Tensor) -> Tensor:
    """`tensor` in the autocast type of its device, where autocast is on; float64 stays as it is."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor
