"""Choice of the implementation ("backend") that computes an operator, the same for all operators.

`choose_backend` is the only place that decides between Triton and plain PyTorch. `auto` takes what was measured to be
faster on this device (verdicts.py).
"""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import verdicts
from .recording import exporting
from .workload import Workload

BACKENDS = ("auto", "triton", "reference")

# The backend of a call that names none. Read once, because a compiled graph would not notice a later change.
default_backend = os.environ.get("TESSEL_KERNELS", "auto")

# Looked up once, outside functions that torch.compile traces: torch 2.11 cannot trace `find_spec`.
_triton_installed = importlib.util.find_spec("triton") is not None

_interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreting() -> bool:
    """Whether Triton runs in its CPU interpreter. CPU tensors are supported then."""
    return _interpreting


def use_backend(backend: str) -> None:
    """Set the backend of calls that name none, before anything is compiled. Raises ValueError for an unknown one."""
    global default_backend
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    default_backend = backend


def choose_backend(name: str, backend: str | None, reasons: Sequence[str], work: Workload) -> str:
    """Return the backend for one call of the operator `name`: `triton`, `reference` or `auto`.

    Args:
        name: the operator, for example `window_attention`.
        backend: what the caller asked for; None means `default_backend`.
        reasons: why the Triton kernels cannot run on these tensors (empty if they can).
        work: the size of the call; `auto` takes the kernels where the verdict says so for its class.

    Returns:
        `auto` only if the operator should run in plain PyTorch and is free to choose the form with the least memory.

    Raises:
        ValueError: unknown backend. RuntimeError: `triton` was asked for and cannot run; the message has every reason.
    """
    backend = default_backend if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "triton" and reasons:
        raise RuntimeError(f"{name}: the Triton kernel cannot run here: {'; '.join(reasons)}")
    # an exported graph runs without this package
    if backend == "auto" and not reasons and not exporting() and _fastest(name, work) == "triton":
        return "triton"
    return backend


def _fastest(name: str, work: Workload) -> str:
    operator, dtype = name.removesuffix("_attention"), str(work.dtype).removeprefix("torch.")
    device = "cpu" if _interpreting else "cuda"
    return verdicts.fastest(device, operator, work.shape_class, dtype, work.direction, torch.compiler.is_compiling())


def common_unsupported_reasons(tensor: Tensor, *, head_dim: int) -> list[str]:
    """Reasons why no Triton kernel of this package can run on `tensor`; each operator adds its own."""
    reasons = []
    if not _triton_installed:
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
