"""The model families, registered with timm, and the conversion of published checkpoints to our keys and back.

Importing this package registers every family; `timm.create_model("biformer_small")` then makes a model.
"""

from . import (
    affnet,
    agent,
    attnet,
    biformer,
    biformer_stl,
    crossformer,
    cswin,
    davit,
    dinat,
    dinat_s,
    flowformer,
    halonet,
    inline,
    l2vit,
    lab,
    litv2,
    moh,
    nat,
    s2aformer,
    spectformer,
    transnext,
    uniformer,
    uniformer_light,
    van,
)
from ._conversion import from_published, to_published
from ._cost import Cost, cost_of, model_cost
from ._family import list_families, list_models
from ._pretrained import has_weights
from ._resizing import resized_weights
from ._swap import swap

__all__ = [
    "Cost",
    "affnet",
    "agent",
    "attnet",
    "biformer",
    "biformer_stl",
    "cost_of",
    "crossformer",
    "cswin",
    "davit",
    "dinat",
    "dinat_s",
    "flowformer",
    "from_published",
    "halonet",
    "has_weights",
    "l2vit",
    "lab",
    "inline",
    "list_families",
    "list_models",
    "litv2",
    "model_cost",
    "moh",
    "nat",
    "resized_weights",
    "s2aformer",
    "spectformer",
    "swap",
    "to_published",
    "transnext",
    "uniformer",
    "uniformer_light",
    "van",
]
