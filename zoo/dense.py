"""Any backbone of timm as dense prediction takes it: feature maps of several strides, each with a norm of its own."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._keymap import MissingKeys, UnknownKeys
from ._registry import dense_norm, from_published_dense, is_ours

PREFIXES = ("module.", "backbone.", "encoder.")  # of a backbone's keys in a published segmenter or detector
START = re.compile(r"(?:(?<=^)|(?<=\()|(?<=\|))\^")
BatchNorms = Literal["train", "eval", "frozen"]


class DenseBackbone(nn.Module):
    """Image `[B, 3, H, W]` to a list of maps `[B, channels[i], ~H/strides[i], ~W/strides[i]]`, any H, W >= 1.

    The classifier and the final norm of the model are dropped. Each map passes through a fresh norm, which only the
    decoder sees: the next stage reads the map without it. Attributes: `channels`, `strides` (of the maps),
    `pretrained_cfg` (timm's, with the mean and std of the input).
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        levels: Sequence[int] = (0, 1, 2, 3),
        norms: Sequence[bool] | None = None,
        batch_norm: BatchNorms = "train",
        **options: Any,
    ):
        """name: of any model of timm or tessel with `forward_intermediates`; options: of `timm.create_model`.

        levels: which of the last four stages hand out their map. norms: which of these have a norm; None: as the
        paper's own dense backbone has them, and none for models that are not ours. batch_norm: train; eval keeps the
        running statistics as they are and trains weights and biases; frozen trains neither. Raises ValueError for a
        model without four stages of different strides, for `norms` of another length than `levels`, and for an
        unknown `batch_norm`.
        """
        if batch_norm not in (known := get_args(BatchNorms)):
            raise ValueError(f"batch_norm={batch_norm!r} is unknown; use one of {', '.join(known)}")
        super().__init__()
        features: Any = timm.create_model(
            name, pretrained=pretrained, features_only=True, feature_cls="getter", out_indices=4, **options
        )
        reductions = features.feature_info.reduction()
        if len(set(reductions)) < 4:
            raise ValueError(
                f"{name} has maps of stride {', '.join(map(str, reductions))}, not of four; dense prediction needs a "
                "hierarchical model"
            )
        if not levels or not set(levels) <= set(range(4)) or list(levels) != sorted(set(levels)):
            raise ValueError(f"levels={list(levels)} are no rising numbers of stages among 0, 1, 2, 3")
        self.body: Any = features.model
        self.levels, self.batch_norm = tuple(levels), batch_norm
        self.name, self.options = name, options
        self.pretrained_cfg = features.model.pretrained_cfg
        self.channels = [features.feature_info.channels()[level] for level in levels]
        self.strides = [reductions[level] for level in levels]
        self.indices = [features.out_indices[level] for level in levels]
        if levels[-1] < 3:  # what comes after the last map that is read would never learn
            self.body.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        ours = is_ours(name)
        if norms is None:
            norms = [ours and dense_norm(name) is not None] * len(levels)
        if len(norms) != len(levels):
            raise ValueError(f"norms={list(norms)} must say for each of the {len(levels)} levels whether it has one")
        fresh: Callable[[int], nn.Module] = (dense_norm(name) if ours else None) or LayerNorm2d
        self.norms = nn.ModuleDict(
            {str(level): fresh(c) for level, c, on in zip(levels, self.channels, norms, strict=True) if on}
        )
        if batch_norm == "frozen":
            for module in self._batch_norms():
                module.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body.forward_intermediates(x, indices=self.indices, intermediates_only=True, stop_early=True)
        return [
            self.norms[str(level)](m) if str(level) in self.norms else m
            for level, m in zip(self.levels, maps, strict=True)
        ]

    def train(self, mode: bool = True) -> "DenseBackbone":
        super().train(mode)
        if self.batch_norm != "train":
            for module in self._batch_norms():
                module.eval()
        return self

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a classifier of the same architecture, by our names; its final norm and head are left.

        Raises ValueError naming what is missing or of another shape.
        """
        own = self.body.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise ValueError(f"{self.name}: {len(missing)} weights are not there: {', '.join(missing[:5])}")
        for key, tensor in own.items():
            if tensor.shape != state[key].shape:
                raise ValueError(f"{self.name}: {key} is {list(state[key].shape)}, the model's {list(tensor.shape)}")
        self.body.load_state_dict({key: state[key] for key in own})

    def load_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the backbone out of a published segmenter or detector; what is left of `state`, a decoder's weights.

        Backbone keys are those below `backbone.` or `encoder.`, or all of them where none is. Raises ValueError for
        keys that the family's key map does not know, and for weights or norms that are not there.
        """
        inner = {}
        for key in state:
            stripped = key.removeprefix(PREFIXES[0])
            if prefix := next((p for p in PREFIXES[1:] if stripped.startswith(p)), None):
                inner[key] = stripped.removeprefix(prefix)
        names = inner or {key: key.removeprefix(PREFIXES[0]) for key in state}
        converted = from_published_dense(self.name, {ours: state[key] for key, ours in names.items()}, **self.options)
        norms = {k.removeprefix("norms."): t for k, t in converted.items() if k.startswith("norms.")}
        body = {k: t for k, t in converted.items() if not k.startswith("norms.")}
        if unknown := sorted(norms.keys() - self.norms.state_dict().keys()):
            raise UnknownKeys(f"{self.name}: norms of levels that this backbone has none for: {', '.join(unknown)}")
        if missing := sorted(self.norms.state_dict().keys() - norms.keys()):
            raise MissingKeys(f"{self.name}: norms that the checkpoint lacks: {', '.join(missing)}")
        counters = {k: t for k, t in self.body.state_dict().items() if not t.is_floating_point()}
        self.start_from(counters | body)
        self.norms.load_state_dict(norms)
        return {key: tensor for key, tensor in state.items() if key not in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups of the body under the names they have here; all else counts as the last layer."""
        return {key: below(spec, "body.") for key, spec in self.body.group_matcher(coarse=coarse).items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay beside biases and one-dimensional ones."""
        inner = getattr(self.body, "no_weight_decay", set)()
        return {f"body.{name}" for name in inner}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.body.set_grad_checkpointing(enable)

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, _BatchNorm)]


def below(spec: Any, prefix: str) -> Any:
    """A pattern of timm's group matcher, or a list of them, for names that stand below `prefix`."""
    if isinstance(spec, str):
        # a start of the name is asked for in each alternative, or not: the prefix stands for all of them
        return f"^{re.escape(prefix)}(?:{START.sub('', spec)})"
    return [(below(pattern, prefix), suffix) for pattern, suffix in spec]
