"""Shared code of the tests that run Triton kernels in the CPU interpreter; test_kernels.py runs those."""

from collections.abc import Sequence

import pytest
import torch

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Deterministic mode fills `torch.empty` with NaN, so that unwritten memory shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-12)).item()


def opcheck_pair(name: str, inputs: Sequence, backward_inputs) -> None:
    """Run torch's checks on the operator `name` with gradients, and on its backward operator.

    `backward_inputs(*outputs)` returns the arguments of the backward operator. It has no gradient of its own, so its
    arguments are detached.
    """
    torch.library.opcheck(getattr(torch.ops.tessel, name).default, tuple(inputs))
    with torch.no_grad():
        outputs = getattr(torch.ops.tessel, name)(*inputs)
        arguments = [_detached(x) for x in backward_inputs(*outputs)]
    torch.library.opcheck(getattr(torch.ops.tessel, f"{name}_backward").default, tuple(arguments))


def _detached(x):
    if isinstance(x, torch.Tensor):
        return x.detach()
    return [_detached(item) for item in x] if isinstance(x, list | tuple) else x
