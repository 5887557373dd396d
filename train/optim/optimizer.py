"""The optimizer: timm's, by name, with parameter groups for weight decay, layer decay and `optim.lr_factors`."""

import difflib
import re
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..errors import UserError
from ..recipe.schema import Optim

Groups = list[dict[str, Any]]


def build_optimizer(
    model: nn.Module, optim: Optim, lr: float, split: Callable[[Groups], Groups] | None = None
) -> torch.optim.Optimizer:
    """timm's optimizer `optim.name` over the trainable parameters, with base learning rate `lr`.

    split: makes finer parameter groups of those that follow from the recipe.

    Biases, norm weights (unless `optim.decay_norms`) and the parameters that the model's `no_weight_decay()` names
    get no weight decay. Raises UserError for an unknown name and for arguments that the optimizer does not take.
    """
    known = [str(name) for name in timm.optim.list_optimizers()]
    if (name := optim.name) not in known:
        similar = difflib.get_close_matches(name, known, n=3) or ["adamw"]
        raise UserError(f"optim.name={name!r} is unknown to timm; did you mean {' or '.join(similar)}?")
    grouping: dict[str, Any] = {
        "weight_decay": optim.weight_decay,
        "layer_decay": optim.layer_decay,
        "filter_bias_and_bn": not optim.decay_norms,
    }

    def groups(model: nn.Module) -> Groups:
        found = param_groups_lr_factors(model, optim, lr) if optim.lr_factors else _timm_groups(model, optim)
        return split(found) if split else found

    if optim.lr_factors or split:
        grouping["param_group_fn"] = groups
    try:
        return timm.optim.create_optimizer_v2(model, name, lr, **grouping, **optim.kwargs)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AssertionError) as error:
        raise UserError(f"optim.name={name} cannot be built with optim.kwargs={optim.kwargs}: {error}") from error


def param_groups_lr_factors(model: nn.Module, optim: Optim, lr: float) -> Groups:
    """timm's parameter groups, each split by the learning-rate factors of `optim.lr_factors`.

    A parameter takes the factor of the first pattern found in its name (re.search), else 1. The factor multiplies the
    group's initial rate: a schedule scales it, but `sched.min_lr` is the same for all groups. Raises UserError for a
    pattern that is not a regular expression or matches no trainable parameter.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in optim.lr_factors:
        try:
            matched = [name for name in names.values() if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"optim.lr_factors: {pattern!r} is not a regular expression ({error})") from error
        if not matched:
            raise UserError(
                f"optim.lr_factors: {pattern!r} matches no trainable parameter; their names look like "
                f"{next(iter(names.values()))}"
            )
    split = []
    for group in _timm_groups(model, optim):
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factors = (factor for pattern, factor in optim.lr_factors.items() if re.search(pattern, names[parameter]))
            by_factor.setdefault(next(factors, 1.0), []).append(parameter)
        split += [{**group, "params": members, "lr": lr * factor} for factor, members in by_factor.items()]
    return split


def _timm_groups(model: nn.Module, optim: Optim) -> Groups:
    """The groups that timm's factory would make: by weight decay and, with `optim.layer_decay`, by layer."""
    without_decay = getattr(model, "no_weight_decay", set)()
    args: dict[str, Any] = {"no_weight_decay_list": without_decay, "weight_decay_exclude_1d": not optim.decay_norms}
    if optim.layer_decay is None:
        return param_groups_weight_decay(model, optim.weight_decay, **args)
    return param_groups_layer_decay(model, optim.weight_decay, layer_decay=optim.layer_decay, **args)
