"""Structure: backbones registered with timm, and the maps between published checkpoints and ours.

Importing this module registers every family; `timm.create_model("biformer_small")` then builds one.
"""

from . import biformer
from ._registry import from_published, list_models, to_published

__all__ = ["biformer", "from_published", "list_models", "to_published"]
