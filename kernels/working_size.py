"""How large the buffers of the plain definitions may be that work through a map in parts."""

from functools import lru_cache

import torch


@lru_cache
def working_bytes(device: torch.device, *, cpu: int) -> int:
    """Bytes that a buffer on `device` may take: `cpu` on the CPU, a size that fits its cache.

    On a GPU small parts would only add launches. There it is a sixteenth of the memory, or 1 GiB where torch does not
    tell how much there is.
    """
    if device.type == "cpu":
        return cpu
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 16
    return 1 << 30
