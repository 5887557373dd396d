"""What tests of Triton kernels in the CPU interpreter share; they run in processes of their own (test_kernels.py)."""

import pytest
import torch

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Deterministic mode fills `torch.empty` with NaN, so that memory left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-12)).item()
