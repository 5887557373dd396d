"""Neighborhood attention (NAT, DiNAT): each pixel attends to the K x K pixels nearest to it, at a dilation."""

from .functional import CASES, neighborhood_attention, neighborhood_attention_unsupported
from .reference import neighborhood_attention_reference

__all__ = ["CASES", "neighborhood_attention", "neighborhood_attention_reference", "neighborhood_attention_unsupported"]
