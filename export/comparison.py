"""How far an output of an exported file is from that of the model."""

from torch import Tensor


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite if shapes differ, NaN if a number is."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
