"""What is known of a model without making it: its row of the paper, its weights; and what it costs. Imports torch."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from ..checkpoints import Weight, load_manifest
from ..zoo import model_cost
from ..zoo._cost import count_parameters
from ..zoo._family import families


def weights(name: str) -> list[Weight]:
    """The published weights of a model, the default first; of one tag if the name has it."""
    return [weight for weight in load_manifest().values() if name in (weight.model, weight.name)]


def family_name(name: str) -> str:
    """Title of the family, such as "CSWin Transformer: A General Vision Transformer Backbone ..."."""
    module = sys.modules[families[name].build.__module__]
    return (module.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def paper(name: str) -> str:
    return "https://arxiv.org/abs/" + families[name].pretrained_cfg["paper_ids"].removeprefix("arXiv:")


def parameters(name: str) -> float:
    return round(count_parameters(name) / 1e6, 2)


def top1(name: str) -> float | None:
    """ImageNet-1K top-1 in percent that was published with the default weights, or in the paper."""
    rows = weights(name)
    return rows[0].published_top1 if rows else families[name].reported.get(name, (0, None))[1]


def input_side(name: str) -> int:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    return cfg.input_size[-1]


def licenses(name: str) -> str | None:
    return ", ".join(dict.fromkeys(weight.license for weight in weights(name))) or None


# column of `tessel list` -> function of a model's name
MODEL_FACTS: dict[str, Callable[[str], Any]] = {
    "model": lambda name: name,
    "family": lambda name: family_name(name).partition(":")[0],
    "params": parameters,
    "macs": lambda name: round(model_cost(name).macs / 1e9, 2),
    "memory": lambda name: round(model_cost(name).activation_bytes / 1e6, 1),
    "input": input_side,
    "top1": top1,
    "license": licenses,
    "weights": lambda name: ", ".join(f"{w.tag}{'' if w.url else ' (by hand)'}" for w in weights(name)) or None,
    "paper": paper,
}


def configuration(name: str) -> dict[str, Any]:
    """The row of the paper's table: each field is an argument of `timm.create_model`."""
    return dataclasses.asdict(families[name].variants[name])
