"""The interface that timm expects of a model, written once for all families.

A family builds its modules and returns them as `BackboneParts`; `Backbone` adds timm's methods and attributes. Each
family has a subclass of `Backbone` that defines a name and a docstring, no behavior: whatever differs between families
belongs into the modules that the family builds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

# (stage, block of the stage, drop path rate) -> the residual branch of that block's token mixer, for hosts of any mixer
Branch = Callable[[int, int, float], nn.Module]

# what stages pass on: a feature map `[B, C, H, W]`, or a pair of it and a class token `[B, 1, C]`
Features = Tensor | tuple[Tensor, Tensor]


def feature_map(x: Any) -> Tensor:
    """The feature map, without the class token and what else a tuple has after it."""
    return x[0] if isinstance(x, tuple) else x


def class_token_first(x: Tensor, token: Tensor) -> Tensor:
    """A feature map `[B, C, H, W]` and a class token `[B, 1, C]` as tokens `[B, 1 + H*W, C]`."""
    return torch.cat([token, x.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def joined(x: Any) -> Any:
    """A feature map with a class token as tokens, the class token first; a map or a longer tuple as it is."""
    return class_token_first(*x) if isinstance(x, tuple) and len(x) == 2 else x


class Stage(nn.Module):
    """`norm(blocks(down(x)))`: `[B, C_in, H, W] -> [B, dim, ~H/stride, ~W/stride]`; `down` decides the rounding.

    A stage may return a tuple whose first entry is the map; the next stage, or the norm and the head of the model, then
    take the tuple. Gradient checkpointing is applied to the blocks of a stage and nowhere else, so that it is never
    nested.
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
        self.dim, self.stride, self.grad_checkpointing = dim, stride, False
        self.down = nn.Identity() if down is None else down
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Features) -> Features:
        x = self.down(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)
        return self.norm(x)


class Head(Protocol):
    """A classification head; timm's `ClassifierHead` and `NormMlpClassifierHead` have this interface."""

    @property
    def fc(self) -> nn.Module:
        """The classifier, `nn.Identity` where there is none."""
        ...

    @property
    def drop(self) -> nn.Dropout:
        """Dropout before the classifier."""
        ...

    @property
    def num_features(self) -> int:
        """Width of the input of `fc`."""
        ...

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace `fc` by a new one (0 classes: by none) and, unless `pool_type` is None, the pooling.

        Layers between pooling and `fc` keep their weights; `reset_other` removes them. `in_features` is the number of
        input channels, where it changes.
        """
        ...

    def __call__(self, x: Any, pre_logits: bool = False) -> Tensor:
        """`[B, C, H, W]`, or tokens with a class token, to logits, or with `pre_logits` to the input of `fc`."""
        ...


def keep_initialization(module: nn.Module) -> None:
    """The default of `BackboneParts.init`: leaves every layer as its class initializes it."""


@dataclass
class BackboneParts:
    """The modules of a model and what `Backbone` must know about them; returned by the `build` of a family.

    no_weight_decay: last parts of the names of parameters that have two or more dimensions and take no weight decay.
    init: called on every module after the initialization of its own class.
    """

    stem: nn.Module
    stages: Sequence[Stage]
    head: Head
    norm: nn.Module | None = None
    stem_stride: int = 4
    no_weight_decay: frozenset[str] = field(default_factory=frozenset)
    init: Callable[[nn.Module], None] = keep_initialization


def channels_last(x: Tensor) -> Tensor:
    """`x: [B, C, H, W]` in channels_last memory, itself if it is already."""
    # not `x.contiguous(memory_format=...)`, which torch.vmap refuses
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def initialize_mixer(mixer: nn.Module) -> None:
    """Initialize a mixer that no family owns: its linear layers as in most of them, unless it has a way of its own."""
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in mixer.modules():
        if any(module.children()):
            _reset(module)


def _reset(module: nn.Module) -> None:
    # batch norm resets its running statistics in `reset_parameters` too
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


class Backbone(nn.Module):
    """A hierarchical vision backbone: image `[B, in_chans, H, W]` to logits `[B, num_classes]`, any H, W >= 1.

    Images of any memory format are converted to channels_last, which the token mixers rely on; feature maps are
    channels_last too. `feature_info` lists channels, stride and module path of each stage.
    """

    def __init__(self, parts: BackboneParts, *, num_classes: int, in_chans: int):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem = parts.stem
        self.stages = nn.Sequential(*parts.stages)
        self.norm = nn.Identity() if parts.norm is None else parts.norm
        self.head = parts.head
        self.num_features = parts.stages[-1].dim
        self.head_hidden_size = self.head.num_features
        self._no_weight_decay, self._init = parts.no_weight_decay, parts.init
        self.feature_info, reduction = [], parts.stem_stride
        for i, stage in enumerate(parts.stages):
            reduction *= stage.stride
            self.feature_info.append({"num_chs": stage.dim, "reduction": reduction, "module": f"stages.{i}"})
        self._initialize(self)

    def _initialize(self, module: nn.Module) -> None:
        """As `module.apply(self._init)`, except for mixers that were made from a specification."""
        if hasattr(module, "specification"):
            initialize_mixer(module)
            return
        for child in module.children():
            self._initialize(child)
        self._init(module)

    @property
    def drop_rate(self) -> float:
        """Dropout probability before the classifier."""
        return self.head.drop.p

    @property
    def grad_checkpointing(self) -> bool:
        """Whether the backward pass recomputes the blocks; `set_grad_checkpointing` changes it."""
        return any(getattr(stage, "grad_checkpointing", False) for stage in self.stages)

    def init_weights(self) -> None:
        """Initialize all parameters and buffers again, as the constructor does; for models made on the meta device."""
        # children first, as in the constructor: a module may initialize its layers differently from their own default
        self.apply(_reset)
        self._initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to the last feature map after the final norm, `[B, num_features, h, w]`.

        Models with a class token return it and the map as tokens `[B, 1 + h*w, num_features]`, as timm's do.
        """
        return feature_map(self._before_head(x))

    def _before_head(self, x: Tensor) -> Any:
        """What the head takes: the last map after the final norm, tokens, or a longer tuple of the last stage."""
        return joined(self.norm(self.stages(self.stem(channels_last(x)))))

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """The result of `forward_features` to logits, or with `pre_logits` to the pooled `[B, head_hidden_size]`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self._before_head(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps `[B, C, h, w]` of the chosen stages; unless `intermediates_only`, the final features and these.

        indices: an int for the last n stages, a list (negatives allowed), None for all. norm: apply the final norm to
        the output of the last stage. stop_early: do not run the stages after the last chosen one; the final features
        are then the output of that stage, without the final norm.
        """
        assert output_fmt == "NCHW", f"output_fmt={output_fmt!r}: feature maps are NCHW only"
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(channels_last(x))
        taken = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                taken.append(feature_map(self.norm(x) if norm and i == len(self.feature_info) - 1 else x))
        if intermediates_only:
            return taken
        return feature_map(joined(self.norm(x) if i == len(self.feature_info) - 1 else x)), taken

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the outputs of the chosen stages do not need; returns the stages' absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.num_classes = 0
            self.head.reset(0, "", reset_other=True, in_features=self.num_features, **get_device_dtype(self))
            self.head_hidden_size = self.head.num_features
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's parameter groups from input to output, for layer decay: one per block, or per stage if `coarse`."""
        blocks = [
            (r"^stages\.(\d+)\.down", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))] if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay, besides biases and one-dimensional parameters."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in self._no_weight_decay}

    def get_classifier(self) -> nn.Module:
        """The layer that computes the logits; `nn.Identity` where there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` (0: by none), and the pooling unless it is None.

        All other weights of the model are kept.
        """
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, reset_other=False, in_features=self.num_features, **get_device_dtype(self)
        )
        self.train(self.training)  # new layers begin in training mode
        self.get_classifier().apply(self._init)
        self.head_hidden_size = self.head.num_features
