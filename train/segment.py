"""`tessel.train.segment.load("RUN/export")` reads an exported segmenter."""

from .tasks.segment import load

__all__ = ["load"]
