"""tessel: a zoo of vision backbones built from shared token mixers.

`import tessel.zoo` registers the models with timm; `tessel.load` makes predictions; `tessel train` trains.
Subpackages, each imports only those before it: `tessel.kernels`, `tessel.blocks`, `tessel.zoo`, `tessel.train`,
`tessel.predict`, `tessel.cli`. `tessel.checkpoints` holds the manifest of published weights.
"""

from pkgutil import resolve_name
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
