"""PLACEHOLDER train/optim/optimizer.py"""

import difflib
import re
from functools import partial
from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..errors import UserError
from ..recipe.schema import Optim


def build_optimizer(model: nn.Module, optim: Optim, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer; its groups keep decay off biases, norms and what the model's no_weight_decay names."""
    known = [str(name) for name in timm.optim.list_optimizers()]
    if (name := optim.name) not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["adamw"]
        raise UserError(f"optim.name={name!r} is unknown to timm; did you mean {' or '.join(near)}?")
    grouping: dict[str, Any] = {
        "weight_decay": optim.weight_decay,
        "layer_decay": optim.layer_decay,
        "filter_bias_and_bn": not optim.decay_norms,
    }
    if optim.lr_factors:
        grouping["param_group_fn"] = partial(factored_groups, optim=optim, lr=lr)
    try:
        return timm.optim.create_optimizer_v2(model, name, lr, **grouping, **optim.kwargs)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AssertionError) as error:
        raise UserError(f"optim.name={name} cannot be built with optim.kwargs={optim.kwargs}: {error}") from error


def factored_groups(model: nn.Module, optim: Optim, lr: float) -> list[dict[str, Any]]:
    """timm's parameter groups, cut by `optim.lr_factors`; a group's schedule starts at its own lr and ends with all."""
    spared = getattr(model, "no_weight_decay", set)()
    args: dict[str, Any] = {"no_weight_decay_list": spared, "weight_decay_exclude_1d": not optim.decay_norms}
    if optim.layer_decay is None:
        groups = param_groups_weight_decay(model, optim.weight_decay, **args)
    else:
        groups = param_groups_layer_decay(model, optim.weight_decay, layer_decay=optim.layer_decay, **args)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in optim.lr_factors:
        try:
            found = [name for name in names.values() if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"optim.lr_factors: {pattern!r} is no regular expression ({error})") from error
        if not found:
            raise UserError(
                f"optim.lr_factors: {pattern!r} is found in no name of a trained parameter; they are called "
                f"{next(iter(names.values()))} and the like"
            )
    cut = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factors = (factor for pattern, factor in optim.lr_factors.items() if re.search(pattern, names[parameter]))
            parts.setdefault(next(factors, 1.0), []).append(parameter)
        cut += [{**group, "params": members, "lr": lr * factor} for factor, members in parts.items()]
    return cut
