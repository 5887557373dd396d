"""Models and mixers side by side: what they cost, how fast they are, how far they see, and how well they learn."""

from .comparison import compare
from .probing import probe
from .subjects import PEERS, Subject, parse_subject

__all__ = ["PEERS", "Subject", "compare", "parse_subject", "probe"]
