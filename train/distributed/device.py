"""The device of a process, and what torch can do on it.

Nothing here changes what the CPU and CUDA do. Other accelerators are tried once for each ability; what one of them
lacks is replaced, and `describe_replacements` says so in the log.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import UserError
from ..recipe.schema import Parallel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")
# what torch raises for a dtype or an operator that a device does not have
LACKING = (RuntimeError, TypeError, NotImplementedError, AssertionError)


def accelerator() -> torch.device | None:
    """The accelerator of this machine, without an index: cuda, mps, xpu or another one that torch names."""
    return torch.accelerator.current_accelerator(check_available=True)


def choose_device(name: str, *, processes: int, local_rank: int) -> torch.device:
    """The device of the recipe key run.device, selected as the current one; `auto` is the accelerator, else the CPU.

    Raises UserError for an accelerator that torch does not find, or that cannot run several processes.
    """
    found = accelerator()
    if name not in ("auto", "cpu") and (found is None or found.type != name):
        there = "no GPU" if found is None else f"only {found.type}"
        raise UserError(f"run.device={name}, but torch finds {there}; use run.device=cpu or auto")
    if name == "cpu" or found is None:
        return torch.device("cpu")
    if processes > 1 and collectives(found) is None:
        if name != "auto":
            raise UserError(
                f"run.device={name}: torch cannot average gradients over processes on it; start one process, or use "
                "run.device=cpu"
            )
        return torch.device("cpu")
    if found.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    if torch.accelerator.device_count() > 1:
        found = torch.device(found.type, local_rank)
        torch.accelerator.set_device_index(found)
    return found


def collectives(device: torch.device) -> str | None:
    """The backend of torch.distributed for CPU tensors and those of `device`; None if there is none for the device."""
    if device.type == "cpu":
        return "gloo"
    if device.type == "cuda":
        return "cpu:gloo,cuda:nccl"
    if device.type == "xpu" and dist.is_xccl_available():
        return "cpu:gloo,xpu:xccl"
    return None


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums of losses and metrics on the device: float64, or float32 where it has no float64 (mps)."""
    return torch.float64 if device.type in ("cpu", "cuda") or _has_float64(device.type) else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether `parallel.precision=auto` is bf16 on the device: it is on a GPU that computes in bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" and _trains_in(device.type, torch.bfloat16)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of `parallel.precision`; None for fp32, and where another accelerator cannot train in it."""
    dtype = DTYPES.get(precision)
    if dtype is None or device.type in ("cpu", "cuda") or _trains_in(device.type, dtype):
        return dtype
    return None


def pins_memory(device: torch.device) -> bool:
    """Whether copies to the device are faster from pinned memory."""
    return device.type not in ("cpu", "mps")


def peak_allocated(device: torch.device) -> int | None:
    """The most memory that tensors had on the device, in bytes; None for the CPU, and where torch does not count it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu":
        return None
    return _attempt(lambda: torch.accelerator.max_memory_allocated(device)) or None


def seed_accelerator(seed: int) -> None:
    """Seed the random generators of all devices of the accelerator, if there is one."""
    # torch.manual_seed would also store a stack trace for each backend that is not there
    if device := accelerator():
        module = torch.get_device_module(device)
        getattr(module, "manual_seed_all", module.manual_seed)(seed)


def describe_replacements(asked: str, parallel: Parallel, device: torch.device) -> str:
    """One line on what is done otherwise because the device lacks it; empty on the CPU and on CUDA.

    asked: the recipe key run.device.
    """
    if device.type in ("cpu", "cuda"):
        found = accelerator()
        if asked == "auto" and device.type == "cpu" and found is not None:
            return f"several processes cannot train on {found.type}, so they train on the CPU"
        return ""
    lacking = []
    if sum_dtype(device) == torch.float32:
        lacking.append("losses and metrics are summed in float32, it has no float64")
    if parallel.precision in DTYPES and autocast_dtype(parallel.precision, device) is None:
        lacking.append(f"it computes in fp32, since it cannot train in {parallel.precision}")
    if not pins_memory(device):
        lacking.append("batches are copied from memory that is not pinned")
    if peak_allocated(device) is None:
        lacking.append("memory_gb is that of the whole process")
    return f"on {device.type} " + "; ".join(lacking) if lacking else ""


def _attempt(action: Callable[[], T]) -> T | None:
    try:
        return action()
    except LACKING:
        return None


@cache
def _has_float64(device: str) -> bool:
    return _attempt(lambda: torch.ones(2, dtype=torch.float64, device=device).sum().item()) == 2


@cache
def _trains_in(device: str, dtype: torch.dtype) -> bool:
    """Whether a layer trains under autocast in `dtype`, with the gradient scaler if that is float16."""

    def step() -> bool:
        layer = torch.nn.Linear(2, 2).to(device)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        with torch.autocast(device, dtype):
            y = layer(torch.ones(2, 2, device=device))
        scaler.scale(y.float().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return y.dtype == dtype

    with torch.random.fork_rng(devices=[]):
        return _attempt(step) or False
