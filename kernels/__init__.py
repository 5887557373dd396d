"""Attention operators: tensors in, tensors out. Each has a definition in plain PyTorch and Triton kernels.

One package per operator:

    functional.py   the public function, its checks, CASES (shapes for tests and benchmarks), the torch operators
    reference.py    the definition: readable PyTorch, runs on any device
    triton.py       the Triton kernels and their launches

and four public names: the operator, `<operator>_reference`, `<operator>_unsupported` (the reasons why the Triton
kernels cannot run on these tensors) and `CASES`. Every operator takes `backend="auto" | "triton" | "reference"`; the
environment variable `TESSEL_KERNELS` sets the default. docs/kernels.md explains the kernels.
"""

from .aggregated import aggregated_attention, aggregated_attention_reference, aggregated_attention_unsupported
from .halo import halo_attention, halo_attention_reference, halo_attention_unsupported
from .neighborhood import (
    neighborhood_attention,
    neighborhood_attention_reference,
    neighborhood_attention_unsupported,
)
from .routed import routed_attention, routed_attention_reference, routed_attention_unsupported
from .window import window_attention, window_attention_reference, window_attention_unsupported

__all__ = [
    "aggregated_attention",
    "aggregated_attention_reference",
    "aggregated_attention_unsupported",
    "halo_attention",
    "halo_attention_reference",
    "halo_attention_unsupported",
    "neighborhood_attention",
    "neighborhood_attention_reference",
    "neighborhood_attention_unsupported",
    "routed_attention",
    "routed_attention_reference",
    "routed_attention_unsupported",
    "window_attention",
    "window_attention_reference",
    "window_attention_unsupported",
]
