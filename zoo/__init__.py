"""Structure: backbones registered with timm, and the maps between published checkpoints and ours.

Importing this module registers every family; `timm.create_model("biformer_small")` then builds one.
"""

from . import affnet, biformer, cswin, davit, halonet, litv2, s2aformer, transnext
from ._registry import from_published, list_families, list_models, to_published

__all__ = [
    "affnet",
    "biformer",
    "cswin",
    "davit",
    "from_published",
    "halonet",
    "list_families",
    "list_models",
    "litv2",
    "s2aformer",
    "to_published",
    "transnext",
]
