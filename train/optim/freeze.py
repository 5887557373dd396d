"""Freezing: parameters that are not trained, for the whole training (`model.freeze`) or its beginning (`sched.freeze`).

Modules whose parameters are all frozen run in evaluation mode: their batch norms keep the running statistics, and no
path is dropped.
"""

from collections.abc import Collection
from typing import Any

from timm.models import group_parameters
from torch import nn

from ..errors import UserError


def backbone_parameters(model: Any, prefix: str | None) -> list[str]:
    """Names of the parameters of the backbone: those that begin with `prefix`; without it, all but the classifier's."""
    names = [name for name, _ in model.named_parameters()]
    if prefix is not None:
        return [name for name in names if name.startswith(prefix)]
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)  # some models have a second one for distillation
    trained = {parameter for head in heads for parameter in head.parameters()}
    return [name for name, parameter in model.named_parameters() if parameter not in trained]


def frozen_parameters(model: Any, prefix: str | None, freeze: str | int) -> list[str]:
    """Names of the parameters that `model.freeze` means: of the whole backbone, or of its stem and first stages.

    Raises UserError if the model has not as many stages, or does not tell them.
    """
    backbone = backbone_parameters(model, prefix)
    if not isinstance(freeze, int):
        return backbone
    own = set(backbone)
    try:
        groups = group_parameters(model, model.group_matcher(coarse=True))
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"model.freeze={freeze}: this model does not tell its stages ({type(error).__name__}: {error}); use "
            "model.freeze=backbone"
        ) from error
    # the stem is the first group; the last one may hold the final norm beside the last stage
    layers = [found for names in groups.values() if (found := [name for name in names if name in own])]
    if freeze >= len(layers):
        raise UserError(
            f"model.freeze={freeze}, but the backbone has {len(layers) - 1} stages; use a smaller number, or "
            "model.freeze=backbone for all of it"
        )
    return [name for names in layers[: freeze + 1] for name in names]


def freeze_parameters(model: nn.Module, prefix: str | None, freeze: str | int | None) -> None:
    """Exclude the parameters that `model.freeze` means from training."""
    if freeze is None:
        return
    frozen = set(frozen_parameters(model, prefix, freeze))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def modules_of(model: nn.Module, parameters: Collection[nn.Parameter]) -> list[nn.Module]:
    """The largest modules that have parameters, all of them among `parameters`."""
    own = list(model.parameters())
    if own and all(parameter in parameters for parameter in own):
        return [model]
    return [module for child in model.children() for module in modules_of(child, parameters)]


class FrozenBackbone:
    """Keeps what is frozen as it is: modules in evaluation mode, and a learning rate of 0 during `sched.freeze`.

    In that first part the gradients of the backbone are still computed, so that the moments of the optimizer are those
    of its gradients when it begins to change.
    """

    def __init__(self, model: nn.Module, prefix: str | None, *, freeze: bool, first_steps: int):
        """freeze: whether `model.freeze` is given; first_steps: steps in which the backbone does not change."""
        self.model, self.first_steps = model, first_steps
        fixed = {parameter for parameter in model.parameters() if not parameter.requires_grad} if freeze else set()
        self.always = modules_of(model, fixed)
        self.resting: set[nn.Parameter] = set()
        self.at_first: list[nn.Module] = []
        if first_steps:
            backbone = set(backbone_parameters(model, prefix))
            self.resting = {parameter for name, parameter in model.named_parameters() if name in backbone}
            self.at_first = modules_of(model, self.resting | fixed)

    def split(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer, each split into those that rest at first and the others."""
        parts = [
            {**group, "params": [p for p in group["params"] if (p in self.resting) is rest]}
            for group in groups
            for rest in (True, False)
        ]
        return [part for part in parts if part["params"]]

    def apply(self, optimizer: Any, step: int) -> None:
        """Before update `step`, after its learning rates were set: put modules and learning rates into their state."""
        if self.first_steps and step == self.first_steps:
            self.model.train()
        for module in [*self.always, *(self.at_first if step < self.first_steps else [])]:
            if module.training:
                module.eval()
        if step < self.first_steps:
            for group in optimizer.param_groups:
                if group["params"][0] in self.resting:
                    group["lr"] = 0.0
