"""Tensors in, tensors out: one operator a file, its plain-PyTorch reference beside its Triton kernel.

Each operator file has four public names: the operator, `<operator>_reference` (the definition, readable PyTorch),
`<operator>_unsupported` (why the Triton kernel cannot serve these tensors, as a list of reasons) and `CASES`
(shapes for tests and benchmarks). Every operator takes `backend="auto" | "triton" | "reference"`; the environment
variable `TESSEL_KERNELS` sets the default.
"""

from .routed import routed_attention, routed_attention_reference, routed_attention_unsupported

__all__ = ["routed_attention", "routed_attention_reference", "routed_attention_unsupported"]
