"""Bi-level routed attention (BiFormer): each query region attends to the pixels of the regions it was routed to."""

from .functional import CASES, routed_attention, routed_attention_unsupported
from .reference import routed_attention_reference

__all__ = ["CASES", "routed_attention", "routed_attention_reference", "routed_attention_unsupported"]
