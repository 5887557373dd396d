"""Neighborhood attention (NAT, DiNAT): each pixel attends to the K x K pixels nearest to it, at a dilation."""

from .functional import neighborhood_attention
from .reference import neighborhood_attention_reference

__all__ = ["neighborhood_attention", "neighborhood_attention_reference"]
