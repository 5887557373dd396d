"""Halo attention (HaloNet): blocked local attention whose keys reach a few pixels beyond the block of queries."""

from .functional import CASES, halo_attention, halo_attention_unsupported
from .reference import halo_attention_reference

__all__ = ["CASES", "halo_attention", "halo_attention_reference", "halo_attention_unsupported"]
