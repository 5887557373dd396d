"""`tessel.train.detect.load("RUN/export")` reads an exported detector."""

from .tasks.detect import load

__all__ = ["load"]
