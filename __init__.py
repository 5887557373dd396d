"""tessel: a zoo of vision backbones built from shared token mixers.

`import tessel.zoo` registers the models with timm; `tessel.load` makes predictions; `tessel train` trains.
Subpackages, each imports only those before it: `tessel.kernels`, `tessel.blocks`, `tessel.zoo`, `tessel.train`,
`tessel.predict`, `tessel.cli`. `tessel.checkpoints` holds the manifest of published weights.
"""

import os
import sys
from pkgutil import resolve_name
from types import TracebackType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"
__all__ = ["load"]

if TYPE_CHECKING:
    from .predict import load


def __getattr__(name: str) -> Any:
    """`tessel.load`, which imports torch, is imported when it is first used."""
    if name == "load":
        return resolve_name(f"{__name__}.predict:load")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_command() -> bool:
    """Whether this process runs a command of tessel, and imports the package for that."""
    script = sys.argv[:1]
    if script == ["-m"]:  # Python imports the packages above the module that it will run
        return any(word.partition(".")[0] == __name__ for word in sys.orig_argv[1:4])
    return any(os.path.basename(path) in ("tessel", "tessel-train") for path in script)


def _print_one_line_for_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook` that leaves other exceptions to Python's own."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# commands import torch, which takes seconds, before their `main` can handle Ctrl-C
if _is_command():
    sys.excepthook = _print_one_line_for_ctrl_c
