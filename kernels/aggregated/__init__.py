"""Aggregated attention (TransNeXt): each pixel attends to its neighborhood and to a pooled map under one softmax."""

from .functional import CASES, aggregated_attention, aggregated_attention_unsupported
from .reference import aggregated_attention_reference

__all__ = ["CASES", "aggregated_attention", "aggregated_attention_reference", "aggregated_attention_unsupported"]
