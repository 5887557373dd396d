"""The operators that a call dispatches."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def operators(function: Callable, *args: Any) -> list[str]:
    """Names of the operators that `function(*args)` dispatches, such as `aten.addmm.default`, in their order."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        function(*args)
    return names
