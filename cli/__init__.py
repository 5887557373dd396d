"""The command line: `tessel COMMAND ...`, also as `python -m tessel COMMAND ...`.

Commands import torch and the rest of the package when they run, so that `--help` and completion are quick.
"""

from .application import main

__all__ = ["main"]
