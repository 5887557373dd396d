"""mmsegmentation's decode heads and necks, and mask-classification heads, built from the configs of a recipe.

What the backbone and the data determine (in_channels, num_classes, ...) is filled in.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.segmentation import IGNORE_INDEX
from ...errors import UserError, one_line
from ...heads.freqfusion import FreqFusionNeck, build_freqfusion
from ...openmmlab.compat import build, mmseg_modules
from .head_checks import HEAD_ERRORS, FeatureSpec, FeatureSpecs, check_head, check_neck
from .mask_head import MASK_HEADS, build_mask_head

NUM_STAGES = 4
ALL_STAGES = list(range(NUM_STAGES))
# heads that read several feature maps even if their config does not say so -> the maps they read by default
MULTI_INPUT_HEADS = {
    "UPerHead": ALL_STAGES,
    "FPNHead": ALL_STAGES,
    "SegformerHead": ALL_STAGES,
    "SETRMLAHead": ALL_STAGES,
    "LightHamHead": [1, 2, 3],
    "EncHead": [1, 2, 3],
    "ANNHead": [2, 3],
    **dict.fromkeys(MASK_HEADS, ALL_STAGES),
}
# types that an error suggests
COMMON_HEADS = "UPerHead, FPNHead or SegformerHead"
COMMON_TYPES = {"loss_decode": "CrossEntropyLoss", "neck": "FPN"}


class HeadConfig:
    """The config of a head in a recipe, and the indices of the feature maps that it reads.

    Attributes: `key`, its key in the recipe; `kwargs`, the config; `type`; `indices`, in_index as a list without
    negative numbers; `multi_input`, whether in_index is a list for this type of head.
    """

    def __init__(self, name: str, kwargs: Mapping[str, Any]):
        """name: decode_head or auxiliary_head. Raises UserError if in_index does not fit the type of the head."""
        self.key, self.kwargs = f"task.segment.{name}", dict(kwargs)
        self.type = str(self.kwargs.get("type"))
        self.multi_input = self.type in MULTI_INPUT_HEADS or self.kwargs.get("input_transform") is not None
        in_index = self.kwargs.get("in_index")
        if in_index is None and self.multi_input:
            in_index = MULTI_INPUT_HEADS.get(self.type, ALL_STAGES)
        elif in_index is None:
            # an auxiliary head usually reads the stage before the last one
            in_index = NUM_STAGES - 2 if name == "auxiliary_head" else NUM_STAGES - 1
        is_list = isinstance(in_index, list | tuple)
        indices = list(in_index) if is_list else [in_index]
        if is_list != self.multi_input or not all(type(i) is int for i in indices):
            expected = "several maps; give a list of integers" if self.multi_input else "one map; give an integer"
            raise UserError(f"{self.key}.in_index={in_index}: {self.type} reads {expected}")
        if not indices or not all(-NUM_STAGES <= i < NUM_STAGES for i in indices):
            raise UserError(f"{self.key}.in_index={in_index}: the feature maps are numbered 0, 1, 2, 3")
        self.indices = [i % NUM_STAGES for i in indices]

    @property
    def levels(self) -> set[int]:
        """The feature maps whose values reach the output, which may be fewer or more than `indices`."""
        if self.type == "EncHead" and not self.kwargs.get("add_lateral"):
            return {self.indices[-1]}
        # DeepLab v3+ also reads the finest map
        skip = self.type == "DepthwiseSeparableASPPHead" and self.kwargs.get("c1_channels")
        return set(self.indices) | ({0} if skip else set())


def required_levels(heads: Iterable[HeadConfig], neck: Mapping[str, Any]) -> list[int]:
    """The stages of the backbone that the neck reads or, without a neck, the heads; in ascending order."""
    if neck:
        return list(range(*_neck_levels(neck)))
    return sorted(set().union(*(head.levels for head in heads)))


def _neck_levels(neck: Mapping[str, Any]) -> tuple[int, int]:
    """The half-open range of stages that a neck reads. Raises UserError if start_level or end_level is invalid."""
    start, end = neck.get("start_level", 0), neck.get("end_level", -1)
    if type(start) is not int or not 0 <= start < NUM_STAGES:
        raise UserError(f"task.segment.neck.start_level={start}: the feature maps are numbered 0, 1, 2, 3")
    if type(end) is not int or not (end == -1 or start < end <= NUM_STAGES):
        raise UserError(
            f"task.segment.neck.end_level={end} must be -1 (all maps), or from {start + 1} to {NUM_STAGES}: the last "
            "map that is read, plus one"
        )
    return start, NUM_STAGES if end == -1 else end


def build_neck(
    config: Mapping[str, Any], features: FeatureSpecs, heads: Iterable[HeadConfig]
) -> tuple[nn.Module, list[FeatureSpec]]:
    """The neck and the specs of its outputs.

    Raises UserError if the neck cannot be built or run, or if it computes a map that no head reads: DDP stops at
    parameters without a gradient.
    """
    kwargs, key = dict(_replace_sync_bn(config)), "task.segment.neck"
    start, end = _neck_levels(kwargs)
    if kwargs["type"] == "FreqFusion":
        given = {name: value for name, value in kwargs.items() if name not in ("start_level", "end_level")}
        channels = [spec.channels for spec in features[start:end] if spec]
        neck: Any = FreqFusionNeck(build_freqfusion(key, given, channels), start, end)
    else:
        neck = _build_mmseg_neck(key, kwargs, features, end - start)
    outputs = check_neck(f"{key}.type={kwargs['type']}", neck, features)
    computed = {number for number, out in enumerate(outputs) if not out.passed_through}
    if unread := sorted(computed - set().union(*(head.levels for head in heads))):
        raise UserError(
            f"{key} returns {len(outputs)} maps, but no head reads {', '.join(map(str, unread))}, so their weights "
            "would not be trained; add them to task.segment.decode_head.in_index, or return fewer maps (start_level, "
            "num_outs)"
        )
    return neck, outputs


def _build_mmseg_neck(key: str, kwargs: dict[str, Any], features: FeatureSpecs, levels: int) -> nn.Module:
    """A neck of mmsegmentation that reads so many maps. Raises UserError if it cannot be built."""
    if kwargs["type"] != "Feature2Pyramid":  # it takes a single width, embed_dim
        kwargs.setdefault("in_channels", [spec.channels if spec else 0 for spec in features])
    if kwargs["type"] == "FPN":
        kwargs.setdefault("num_outs", levels)
    if kwargs["type"] == "JPU":  # it requires tuples, which YAML does not have
        kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    return _build_module(key, kwargs)


def build_head(
    config: HeadConfig,
    features: FeatureSpecs,
    num_classes: int,
    class_weight: list[float] | None,
    size: int | None = None,
    avg_non_ignore: bool = True,
) -> nn.Module:
    """A head that was run once on dummy feature maps. Raises UserError if it cannot be built, run or trained.

    class_weight: weights of the classes in the loss; size: see `check_head`; avg_non_ignore: average the cross entropy
    over the labelled pixels only.
    """
    if config.type in MASK_HEADS:
        return _build_mask_head(config, features, num_classes, class_weight)
    kwargs = _resolve_kwargs(config, features, num_classes)
    _check_head_type(config.key, config.type)
    kwargs["loss_decode"] = _resolve_losses(config, class_weight, avg_non_ignore)
    head = _build_module(config.key, kwargs)
    _patch_cross_entropy(head)
    losses = f"{config.key}.loss_decode={config.kwargs.get('loss_decode', 'CrossEntropyLoss')}"
    check_head(f"{config.key}.type={config.type}", head, features, losses=losses, size=size)
    return head


def _build_mask_head(
    config: HeadConfig, features: FeatureSpecs, num_classes: int, class_weight: list[float] | None
) -> nn.Module:
    if class_weight is not None:
        raise UserError(f"task.segment.class_weight has no effect with {config.key}.type={config.type}; remove it")
    kwargs = {name: value for name, value in config.kwargs.items() if name != "type"}
    return build_mask_head(config.type, config.key, kwargs, features, num_classes)


def _resolve_kwargs(config: HeadConfig, features: FeatureSpecs, num_classes: int) -> dict[str, Any]:
    """The kwargs of a head with what backbone, neck and data determine. Raises UserError for other values of these."""
    kwargs, key = dict(_replace_sync_bn(config.kwargs)), config.key
    if max(config.levels) >= len(features):
        raise UserError(f"{key}.in_index={config.indices}, but the neck returns {len(features)} maps")
    if kwargs.get("ignore_index") not in (IGNORE_INDEX, None):
        raise UserError(
            f"{key}.ignore_index={kwargs['ignore_index']}, but unlabelled pixels have {IGNORE_INDEX}; remove it"
        )
    for name in ("num_classes", "out_channels"):
        if kwargs.get(name) not in (num_classes, None):
            raise UserError(f"{key}.{name}={kwargs[name]}, but the data has {num_classes} classes; remove it")
    # of a stage that is in in_index but not read, the backbone has no map
    inputs = [features[i] or FeatureSpec(0, 0) for i in config.indices]
    if config.multi_input:
        kwargs["in_index"] = config.indices
        kwargs.setdefault("in_channels", [spec.channels for spec in inputs])
    else:
        kwargs["in_index"] = config.indices[0]
        kwargs.setdefault("in_channels", inputs[0].channels)
    kwargs.setdefault("norm_cfg", {"type": "BN", "requires_grad": True})
    kwargs.setdefault("align_corners", False)
    kwargs.setdefault("num_classes", num_classes)
    if config.type == "FPNHead":
        kwargs.setdefault("feature_strides", [spec.stride for spec in inputs])
    if config.type == "DepthwiseSeparableASPPHead":
        finest = features[0] if 0 in config.levels else None
        kwargs.setdefault("c1_in_channels", finest.channels if finest else 0)
        kwargs.setdefault("c1_channels", 0)
    return kwargs


def _resolve_losses(config: HeadConfig, class_weight: list[float] | None, avg_non_ignore: bool) -> Any:
    """loss_decode with the class weights and avg_non_ignore in each cross entropy that does not set them.

    Raises UserError for what is not a loss, and for class weights without a cross entropy.
    """
    given, key = config.kwargs.get("loss_decode", {"type": "CrossEntropyLoss"}), f"{config.key}.loss_decode"
    is_list = isinstance(given, list | tuple)
    losses = [dict(loss) if isinstance(loss, Mapping) else {} for loss in (given if is_list else [given])]
    if not losses or not all(isinstance(loss.get("type"), str) for loss in losses):
        raise UserError(f"{key}={given} must be a loss, as in {{type: CrossEntropyLoss}}, or a list of losses")
    cross_entropies = [loss for loss in losses if loss["type"] == "CrossEntropyLoss"]
    for loss in cross_entropies:
        loss.setdefault("avg_non_ignore", avg_non_ignore)
        if class_weight is not None:
            loss.setdefault("class_weight", class_weight)
    if class_weight is not None and not cross_entropies:
        types = ", ".join(loss["type"] for loss in losses)
        raise UserError(f"task.segment.class_weight has no effect with {key} of {types}; remove it")
    for loss in losses:
        module = _build_module(key, loss)
        if not hasattr(module, "loss_name"):
            raise UserError(f"{key}.type={loss['type']} is not a loss of mmsegmentation; use CrossEntropyLoss")
        if "loss" not in str(module.loss_name):
            raise UserError(f"{key}.loss_name={module.loss_name} must contain the word loss, else it is not minimized")
    return losses if is_list else losses[0]


def _patch_cross_entropy(head: nn.Module) -> None:
    """Use `cross_entropy` in the softmax cross entropy losses of a head."""
    for loss in head.modules():
        if type(loss).__name__ == "CrossEntropyLoss" and not (loss.use_sigmoid or loss.use_mask):  # type: ignore[union-attr]
            loss.cls_criterion = cross_entropy  # type: ignore[assignment]


def cross_entropy(
    pred: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    *,
    class_weight: Tensor | None,
    reduction: str,
    avg_factor: float | None,
    avg_non_ignore: bool,
    ignore_index: int,
) -> Tensor:
    """Replacement of mmsegmentation's cross entropy with the same values.

    mmsegmentation's indexes class_weight with ignore_index, which is out of range, and synchronizes the GPU to count
    the ignored pixels. pred: logits [N, C, H, W]; label: [N, H, W]; weight: per pixel [N, H, W]. The mean is
    sum(w l) / (sum(w) + eps) over the pixels that are not ignored, so it is 0 if all are ignored.
    """
    loss = F.cross_entropy(pred, label, weight=class_weight, reduction="none", ignore_index=ignore_index)
    loss = loss if weight is None else loss * weight.float()
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if avg_factor is None:
        labelled = label != ignore_index
        pixel_weight = loss.new_ones(()).expand_as(label)
        if class_weight is not None:
            pixel_weight = class_weight[label.where(labelled, 0)]
        skip_ignored = avg_non_ignore or class_weight is not None
        total = (pixel_weight * labelled if skip_ignored else pixel_weight).sum()
    else:
        total = loss.new_tensor(avg_factor)
    return loss.sum() / (total + torch.finfo(torch.float32).eps)


def _replace_sync_bn(config: Any) -> Any:
    """A copy of a config with BN instead of SyncBN; parallel.sync_batch_norm decides on synchronization."""
    if isinstance(config, Mapping):
        return {k: "BN" if (k, v) == ("type", "SyncBN") else _replace_sync_bn(v) for k, v in config.items()}
    return [_replace_sync_bn(value) for value in config] if isinstance(config, list | tuple) else config


def _build_module(key: str, config: Mapping[str, Any]) -> Any:
    """The module that `config` describes, initialized. Raises UserError naming `key` if it cannot be built."""
    kind, known = config["type"], sorted(mmseg_modules().HEADS.module_dict)
    if kind in ("MaskFormerHead", "Mask2FormerHead"):
        raise UserError(
            f"{key}.type={kind} needs mmdetection, whose compiled operators do not build with current torch; use "
            f"Mask2Former, {COMMON_HEADS}"
        )
    if kind not in known:
        suggested = COMMON_TYPES.get(key.rpartition(".")[2], COMMON_HEADS)
        near = difflib.get_close_matches(str(kind), known, n=3) or [suggested]
        raise UserError(f"{key}.type={kind} is unknown to mmsegmentation; did you mean {' or '.join(near)}?")
    with _no_init_logging():
        try:
            module: Any = build(config)
            if hasattr(module, "init_weights"):
                module.init_weights()
        except HEAD_ERRORS as error:
            raise UserError(f"{key}.type={kind} cannot be built with {dict(config)}: {one_line(error)}") from error
    return module


def _check_head_type(key: str, kind: str) -> None:
    """Raises UserError for modules of mmsegmentation that are not decode heads, or depend on another head."""
    known = mmseg_modules().HEADS.module_dict
    # mmseg_modules() made these importable
    from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    if kind in known and issubclass(known[kind], BaseCascadeDecodeHead):
        raise UserError(f"{key}.type={kind} refines the output of another head, which is not supported; use another")
    if kind in known and not issubclass(known[kind], BaseDecodeHead) and not kind.startswith("Mask"):
        raise UserError(f"{key}.type={kind} is not a decode head of mmsegmentation; use {COMMON_HEADS}")


@contextmanager
def _no_init_logging() -> Iterator[None]:
    """Silence mmengine, which logs a line for every parameter that it initializes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
