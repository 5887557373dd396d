"""Any hierarchical backbone of timm for dense prediction: feature maps of four strides, each with an optional norm."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._conversion import from_published_dense
from ._family import dense_norm, dense_options, is_ours
from ._keymap import MissingKeys, UnknownKeys

# prefixes of the backbone's keys in checkpoints of published segmenters and detectors
PREFIXES = ("module.", "backbone.", "encoder.")
# a `^` at the start of a pattern or of one of its alternatives
ANCHOR = re.compile(r"(?:(?<=^)|(?<=\()|(?<=\|))\^")
BatchNorms = Literal["train", "eval", "frozen"]


class DenseBackbone(nn.Module):
    """Image `[B, 3, H, W]` to a list of maps `[B, channels[i], ~H/strides[i], ~W/strides[i]]`, any H, W >= 1.

    The model's classifier and final norm are removed. Each map may pass through a new norm, as in the dense backbones
    of most papers; the next stage reads the map without that norm. Attributes: `channels` and `strides` of the maps,
    `out_indices`, and `pretrained_cfg`, timm's, with mean and std of the input.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norms: Sequence[bool] | None = None,
        batch_norm: BatchNorms = "train",
        **options: Any,
    ):
        """name: any model of timm or tessel with `forward_intermediates`; options: arguments of `timm.create_model`,
            by default those of the paper's dense backbone.

        out_indices: the stages whose maps are returned, in rising order; of models with five stages (timm's
            convolutional ones) the last four count, as stages 0 to 3.
        norms: for each of `out_indices`, whether its map has a norm. None: as in the paper's dense backbone; no norms
            for timm's models.
        batch_norm: of the backbone. "train": normal; "eval": running statistics are fixed, weights and biases are
            trained; "frozen": neither changes.

        Raises ValueError for a model without four stages of different strides and for wrong arguments.
        """
        if batch_norm not in (known := get_args(BatchNorms)):
            raise ValueError(f"batch_norm={batch_norm!r} is unknown; use one of {', '.join(known)}")
        if not out_indices or not set(out_indices) <= set(range(4)) or list(out_indices) != sorted(set(out_indices)):
            raise ValueError(f"out_indices={list(out_indices)} must be stages among 0, 1, 2, 3 in rising order")
        if norms is not None and len(norms) != len(out_indices):
            raise ValueError(f"norms={list(norms)} must have {len(out_indices)} entries, one for each of out_indices")
        super().__init__()
        options = dense_options(name) | options
        features: Any = timm.create_model(
            name, pretrained=pretrained, features_only=True, feature_cls="getter", out_indices=4, **options
        )
        strides = features.feature_info.reduction()
        if len(set(strides)) < 4:
            raise ValueError(
                f"{name} has feature maps of strides {', '.join(map(str, strides))}; dense prediction needs a "
                "hierarchical model with four different strides"
            )
        self.body: Any = features.model
        self.out_indices, self.batch_norm = tuple(out_indices), batch_norm
        self.name, self.options = name, options
        self.pretrained_cfg = features.model.pretrained_cfg
        self.channels = [features.feature_info.channels()[index] for index in out_indices]
        self.strides = [strides[index] for index in out_indices]
        # the same stages as timm counts them
        self._timm_indices = [features.out_indices[index] for index in out_indices]
        if out_indices[-1] < 3:
            # without pruning, the parameters after the last map would get no gradient
            self.body.prune_intermediate_layers(self._timm_indices, prune_norm=True, prune_head=True)
        self.norms = self._make_norms(norms)
        if batch_norm == "frozen":
            for module in self._batch_norms():
                module.requires_grad_(False)
        self.train()  # puts batch norm into the mode that `batch_norm` asks for

    def _make_norms(self, norms: Sequence[bool] | None) -> nn.ModuleDict:
        """The norms of the maps, by stage."""
        papers = dense_norm(self.name) if is_ours(self.name) else None
        if norms is None:
            norms = [papers is not None] * len(self.out_indices)
        make: Callable[[int], nn.Module] = papers or LayerNorm2d
        wanted = zip(self.out_indices, self.channels, norms, strict=True)
        return nn.ModuleDict({str(index): make(channels) for index, channels, on in wanted if on})

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body.forward_intermediates(x, indices=self._timm_indices, intermediates_only=True, stop_early=True)
        return [
            self.norms[str(index)](m) if str(index) in self.norms else m
            for index, m in zip(self.out_indices, maps, strict=True)
        ]

    def train(self, mode: bool = True) -> "DenseBackbone":
        super().train(mode)
        if self.batch_norm != "train":
            for module in self._batch_norms():
                module.eval()
        return self

    def load_classifier(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of a classifier of the same architecture, by our keys, without its final norm and head.

        Raises ValueError naming keys that are missing or have another shape.
        """
        own = self.body.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise ValueError(f"{self.name}: {len(missing)} weights are missing: {', '.join(missing[:5])}")
        for key, tensor in own.items():
            if tensor.shape != state[key].shape:
                raise ValueError(
                    f"{self.name}: {key} has shape {list(state[key].shape)} in the checkpoint, {list(tensor.shape)} in "
                    "the model"
                )
        self.body.load_state_dict({key: state[key] for key in own})

    def load_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load the backbone of a published segmenter or detector; returns the rest of `state`, weights of the decoder.

        Keys of the backbone begin with `backbone.` or `encoder.`; if none does, all keys are taken for the backbone's.
        Raises ValueError for keys that the family's key mapping does not know, and for missing weights or norms.
        """
        prefixed = {}
        for key in state:
            stripped = key.removeprefix(PREFIXES[0])
            if prefix := next((p for p in PREFIXES[1:] if stripped.startswith(p)), None):
                prefixed[key] = stripped.removeprefix(prefix)
        names = prefixed or {key: key.removeprefix(PREFIXES[0]) for key in state}
        renamed = {published: state[key] for key, published in names.items()}
        converted = from_published_dense(self.name, renamed, **self.options)
        norms = {k.removeprefix("norms."): t for k, t in converted.items() if k.startswith("norms.")}
        body = {k: t for k, t in converted.items() if not k.startswith("norms.")}
        if unknown := sorted(norms.keys() - self.norms.state_dict().keys()):
            raise UnknownKeys(f"{self.name}: the checkpoint has norms that this backbone lacks: {', '.join(unknown)}")
        if missing := sorted(self.norms.state_dict().keys() - norms.keys()):
            raise MissingKeys(f"{self.name}: the checkpoint lacks norms that this backbone has: {', '.join(missing)}")
        # integer counters of batch norm are not published
        counters = {k: t for k, t in self.body.state_dict().items() if not t.is_floating_point()}
        self.load_classifier(counters | body)
        self.norms.load_state_dict(norms)
        return {key: tensor for key, tensor in state.items() if key not in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups of the body, for layer decay; the norms belong to the last group."""
        return {key: prefix_patterns(spec, "body.") for key, spec in self.body.group_matcher(coarse=coarse).items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay, besides biases and one-dimensional parameters."""
        inner = getattr(self.body, "no_weight_decay", set)()
        return {f"body.{name}" for name in inner}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.body.set_grad_checkpointing(enable)

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, _BatchNorm)]


def prefix_patterns(spec: Any, prefix: str) -> Any:
    """Change a pattern of timm's group matcher, or a list of them, to match names that begin with `prefix`."""
    if isinstance(spec, str):
        # each alternative of a pattern may have its own `^`; one prefix before all of them replaces these
        return f"^{re.escape(prefix)}(?:{ANCHOR.sub('', spec)})"
    return [(prefix_patterns(pattern, prefix), suffix) for pattern, suffix in spec]
