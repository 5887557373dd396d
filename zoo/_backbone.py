"""The timm contract, once, for every family.

A family hands over finished modules (`Parts`); `Backbone` adds what timm asks of a model and nothing else. It is never
subclassed and has no options: what differs between families is composed in the family's file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn


class Stage(nn.Module):
    """`norm(blocks(down(x)))`: `[B, C_in, H, W] -> [B, dim, H/stride, W/stride]`, rounded as `down` rounds.

    Gradient checkpointing acts here, on the blocks, and nowhere else.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        dim: int,
        stride: int,
        down: nn.Module | None = None,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.dim, self.stride, self.checkpointing = dim, stride, False
        self.down = nn.Identity() if down is None else down
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        x = checkpoint_seq(self.blocks, x) if self.checkpointing and self.training else self.blocks(x)
        return self.norm(x)


def keep_initialisation(module: nn.Module) -> None:
    """The default of `Parts.init`: every layer stays as its class initialises it."""


@dataclass
class Parts:
    """What a family hands over.

    `head` has `fc`, `num_features`, `reset(num_classes, pool_type, in_features=...)` and `forward(x, pre_logits=...)`,
    as timm's heads do. `no_decay` names parameters (last part of the key) with two or more dimensions that take no
    weight decay.
    `init(module)` is called on every module after its class has initialised it.
    """

    stem: nn.Module
    stages: Sequence[Stage]
    head: Any
    norm: nn.Module | None = None
    stem_stride: int = 4
    no_decay: frozenset[str] = field(default_factory=frozenset)
    init: Callable[[nn.Module], None] = keep_initialisation


class Backbone(nn.Module):
    """A hierarchical vision backbone: image `[B, in_chans, H, W]` to logits `[B, num_classes]`, any H, W >= 1.

    `feature_info` lists the stages: channels, stride and module path of each.
    """

    def __init__(self, parts: Parts, *, num_classes: int, in_chans: int):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem = parts.stem
        self.stages = nn.Sequential(*parts.stages)
        self.norm = nn.Identity() if parts.norm is None else parts.norm
        self.head: Any = parts.head
        self.num_features = parts.stages[-1].dim
        self.head_hidden_size = self.head.num_features
        self._no_decay, self._init = parts.no_decay, parts.init
        self.feature_info, reduction = [], parts.stem_stride
        for i, stage in enumerate(parts.stages):
            reduction *= stage.stride
            self.feature_info.append({"num_chs": stage.dim, "reduction": reduction, "module": f"stages.{i}"})
        self.apply(self._init)

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew, as construction does; for models made on the meta device."""
        for module in self.modules():
            # batch norm resets its running statistics in `reset_parameters` too
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self.apply(self._init)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to the last, normalised feature map `[B, num_features, h, w]`."""
        return self.norm(self.stages(self.stem(x.contiguous(memory_format=torch.channels_last))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map to logits, or with `pre_logits` to the pooled `[B, head_hidden_size]`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The chosen stages' outputs, each `[B, C, h, w]`, and before them the final map unless `intermediates_only`.

        `indices`: an int for the last n stages, a list (negatives allowed), None for all. `norm` applies the final norm
        to the last stage's output. `stop_early` computes no further than needed; the final map is then un-normalised.
        """
        assert output_fmt == "NCHW", f"output_fmt={output_fmt!r}: feature maps are NCHW only"
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        taken = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                taken.append(self.norm(x) if norm and i == len(self.feature_info) - 1 else x)
        if intermediates_only:
            return taken
        return (self.norm(x) if i == len(self.feature_info) - 1 else x), taken

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need; returns their absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.num_classes = 0
            # `reset_other`: what stands between pooling and classifier goes too
            self.head.reset(0, "", reset_other=True, in_features=self.num_features, **get_device_dtype(self))
            self.head_hidden_size = self.head.num_features
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from input to output, for layer decay: by block, or by stage if `coarse`."""
        blocks = [
            (r"^stages\.(\d+)\.down", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))] if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay beside biases and one-dimensional ones."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in self._no_decay}

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits; identity where there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none), with the pooling kept unless `global_pool` names another."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head.apply(self._init)
        self.head_hidden_size = self.head.num_features
