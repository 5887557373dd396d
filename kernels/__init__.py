"""Tensors in, tensors out: one operator a file, its plain-PyTorch reference beside its Triton kernel.

Each operator file has four public names: the operator, `<operator>_reference` (the definition, readable PyTorch),
`<operator>_unsupported` (why the Triton kernel cannot serve these tensors, as a list of reasons) and `CASES`
(shapes for tests and benchmarks). Every operator takes `backend="auto" | "triton" | "reference"`; the environment
variable `TESSEL_KERNELS` sets the default.
"""

from .aggregated import aggregated_attention, aggregated_attention_reference, aggregated_attention_unsupported
from .halo import halo_attention, halo_attention_reference, halo_attention_unsupported
from .routed import routed_attention, routed_attention_reference, routed_attention_unsupported
from .window import window_attention, window_attention_reference, window_attention_unsupported

__all__ = [
    "aggregated_attention",
    "aggregated_attention_reference",
    "aggregated_attention_unsupported",
    "halo_attention",
    "halo_attention_reference",
    "halo_attention_unsupported",
    "routed_attention",
    "routed_attention_reference",
    "routed_attention_unsupported",
    "window_attention",
    "window_attention_reference",
    "window_attention_unsupported",
]
