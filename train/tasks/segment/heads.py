"""Decode heads and necks: mmsegmentation's own, built from its own words and what is known of backbone and data."""

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
from ...openmmlab.compat import build, mmseg_modules
from .head_checks import REFUSED, FeatureSpec, FeatureSpecs, try_head, try_neck

STAGES = 4


# the heads that read several maps without being told to, and which
ALL = list(range(STAGES))


SEVERAL = {"UPerHead": ALL, "FPNHead": ALL, "SegformerHead": ALL, "SETRMLAHead": ALL}


SEVERAL |= {"LightHamHead": [1, 2, 3], "EncHead": [1, 2, 3], "ANNHead": [2, 3]}


USUAL = {"loss_decode": "CrossEntropyLoss", "neck": "FPN"}


USUAL_HEADS = "UPerHead, FPNHead or SegformerHead"


class HeadConfig:
    """A head of the recipe, `name` its key there: its words, and which maps it reads."""

    def __init__(self, name: str, words: Mapping[str, Any]):
        self.key, self.words = f"task.segment.{name}", dict(words)
        self.type = str(self.words.get("type"))
        self.several = self.type in SEVERAL or self.words.get("input_transform") is not None
        given = self.words.get("in_index")
        if given is None:
            one = STAGES - 1 - (name == "auxiliary_head")
            given = SEVERAL.get(self.type, ALL) if self.several else one
        indices = given if isinstance(given, list | tuple) else [given]
        if isinstance(given, list | tuple) != self.several or not all(type(i) is int for i in indices):
            reads = "several maps, so it is a list of numbers" if self.several else "one map, so it is one number"
            raise UserError(f"{self.key}.in_index={given}: {self.type} reads {reads}")
        if not indices or not all(-STAGES <= i < STAGES for i in indices):
            raise UserError(f"{self.key}.in_index={given} is not of the four maps 0, 1, 2, 3")
        self.indices = [i % STAGES for i in indices]

    @property
    def reads(self) -> set[int]:
        if self.type == "EncHead" and not self.words.get("add_lateral"):
            return {self.indices[-1]}
        fine = self.type == "DepthwiseSeparableASPPHead" and self.words.get("c1_channels")
        return set(self.indices) | ({0} if fine else set())


def read_maps(heads: Iterable[HeadConfig], neck: Mapping[str, Any]) -> list[int]:
    """The stages of the backbone whose maps are read, rising."""
    if neck:
        return list(range(*_span(neck)))
    return sorted(set().union(*(head.reads for head in heads)))


def _span(neck: Mapping[str, Any]) -> tuple[int, int]:
    """The first stage that the neck reads, and the one after its last."""
    start, end = neck.get("start_level", 0), neck.get("end_level", -1)
    if type(start) is not int or not 0 <= start < STAGES:
        raise UserError(f"task.segment.neck.start_level={start} is not of the four maps 0, 1, 2, 3")
    if type(end) is not int or not (end == -1 or start < end <= STAGES):
        raise UserError(
            f"task.segment.neck.end_level={end} is neither -1, for all maps, nor in {start + 1}..{STAGES}: it stands "
            "behind the last map that is read"
        )
    return start, STAGES if end == -1 else end


def build_neck(
    words: Mapping[str, Any], maps: FeatureSpecs, heads: Iterable[HeadConfig]
) -> tuple[nn.Module, list[FeatureSpec]]:
    """The neck, and the maps that it hands out."""
    words, key = dict(_plain(words)), "task.segment.neck"
    start, end = _span(words)
    if words["type"] != "Feature2Pyramid":  # which has one width, embed_dim
        words.setdefault("in_channels", [m.channels if m else 0 for m in maps])
    if words["type"] == "FPN":
        words.setdefault("num_outs", end - start)
    if words["type"] == "JPU":  # it refuses lists, and a recipe has no tuples
        words = {word: tuple(value) if isinstance(value, list) else value for word, value in words.items()}
    neck = _built(key, words)
    outs = try_neck(f"{key}.type={words['type']}", neck, maps)
    made = {number for number, out in enumerate(outs) if not out.passed}
    if unread := sorted(made - set().union(*(head.reads for head in heads))):
        raise UserError(
            f"{key} hands out {len(outs)} maps, of which no head reads {', '.join(map(str, unread))}: their weights "
            "would never learn; name them in task.segment.decode_head.in_index, or hand out fewer (start_level, "
            "num_outs)"
        )
    return neck, outs


def build_head(
    wanted: HeadConfig, maps: FeatureSpecs, num_classes: int, weights: list[float] | None, size: int | None = None
) -> nn.Module:
    """The head, tried out. Raises UserError naming it where it cannot be built, run or trained."""
    words, key, several = _plain(wanted.words), wanted.key, wanted.several
    if max(wanted.reads) >= len(maps):
        raise UserError(f"{key}.in_index={wanted.indices}, but the neck hands out {len(maps)} maps")
    # what a head names and does not read is not built
    read = [maps[i] or FeatureSpec(0, 0) for i in wanted.indices]
    words["in_index"] = wanted.indices if several else wanted.indices[0]
    words.setdefault("in_channels", [m.channels for m in read] if several else read[0].channels)
    words.setdefault("norm_cfg", {"type": "BN", "requires_grad": True})
    words.setdefault("align_corners", False)
    words.setdefault("num_classes", num_classes)
    for word, needed in (("num_classes", num_classes), ("out_channels", num_classes), ("ignore_index", IGNORE_INDEX)):
        if words.get(word, needed) not in (needed, None):
            fact = (
                f"masks say {IGNORE_INDEX} for unknown" if word == "ignore_index" else f"the data has {needed} classes"
            )
            raise UserError(f"{key}.{word}={words[word]}, but {fact}; leave it out")
    if wanted.type == "FPNHead":
        words.setdefault("feature_strides", [m.stride for m in read])
    if wanted.type == "DepthwiseSeparableASPPHead":
        fine = maps[0] if 0 in wanted.reads else None
        words.setdefault("c1_in_channels", fine.channels if fine else 0)
        words.setdefault("c1_channels", 0)
    _check_kind(key, wanted.type)
    words["loss_decode"] = _losses(words.get("loss_decode", {"type": "CrossEntropyLoss"}), key, weights)
    head = _built(key, words)
    for loss in head.modules():
        if type(loss).__name__ == "CrossEntropyLoss" and not (loss.use_sigmoid or loss.use_mask):  # type: ignore[union-attr]
            loss.cls_criterion = cross_entropy  # type: ignore[assignment]
    losses = f"{key}.loss_decode={wanted.words.get('loss_decode', 'CrossEntropyLoss')}"
    try_head(f"{key}.type={wanted.type}", head, maps, losses=losses, size=size)
    return head


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
    """mmsegmentation's cross entropy, in place of its own: that one looks the class weight of ignored pixels up, which
    is an error, and waits for the GPU to count them.

    pred: [N, C, H, W]; label: [N, H, W]; the mean is sum(w l) / (sum(w) + eps) over the known pixels, 0 without any.
    """
    loss = F.cross_entropy(pred, label, weight=class_weight, reduction="none", ignore_index=ignore_index)
    loss = loss if weight is None else loss * weight.float()
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if avg_factor is None:
        known = label != ignore_index
        counted = loss.new_ones(()).expand_as(label)
        if class_weight is not None:
            counted = class_weight[label.where(known, 0)]
        total = (counted * known if avg_non_ignore or class_weight is not None else counted).sum()
    else:
        total = loss.new_tensor(avg_factor)
    return loss.sum() / (total + torch.finfo(torch.float32).eps)


def _losses(given: Any, key: str, weights: list[float] | None) -> Any:
    """The loss in mmsegmentation's words, averaged over the pixels that are not ignored."""
    several = isinstance(given, list | tuple)
    losses = [dict(loss) if isinstance(loss, Mapping) else {} for loss in (given if several else [given])]
    if not losses or not all(isinstance(loss.get("type"), str) for loss in losses):
        raise UserError(f"{key}.loss_decode={given}: it is a loss, as in {{type: CrossEntropyLoss}}, or a list of them")
    entropies = [loss for loss in losses if loss["type"] == "CrossEntropyLoss"]
    for loss in entropies:
        loss.setdefault("avg_non_ignore", True)
        if weights is not None:
            loss.setdefault("class_weight", weights)
    if weights is not None and not entropies:
        kinds = ", ".join(loss["type"] for loss in losses)
        raise UserError(f"task.segment.class_weight has no effect with {key}.loss_decode of {kinds}; remove it")
    for loss in losses:
        _check_loss(f"{key}.loss_decode", loss)
    return losses if several else losses[0]


def _check_loss(key: str, words: Mapping[str, Any]) -> None:
    loss = _built(key, words)
    if not hasattr(loss, "loss_name"):
        raise UserError(f"{key}.type={words['type']} is no loss of mmsegmentation; take CrossEntropyLoss")
    if "loss" not in str(loss.loss_name):
        raise UserError(f"{key}.loss_name={loss.loss_name} lacks the word loss: it would be logged and never learnt")


def _plain(words: Any) -> Any:
    """A copy in which SyncBN is batch norm: the trainer synchronises it where there are several GPUs."""
    if isinstance(words, Mapping):
        return {k: "BN" if (k, v) == ("type", "SyncBN") else _plain(v) for k, v in words.items()}
    return [_plain(value) for value in words] if isinstance(words, list | tuple) else words


def _built(key: str, words: Mapping[str, Any]) -> Any:
    kind, known = words["type"], sorted(mmseg_modules().HEADS.module_dict)
    if kind in ("MaskFormerHead", "Mask2FormerHead"):
        raise UserError(
            f"{key}.type={kind} is built on mmdetection, whose compiled operators do not build on current torch; take "
            + USUAL_HEADS
        )
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=3) or [USUAL.get(key.rpartition(".")[2], USUAL_HEADS)]
        raise UserError(f"{key}.type={kind} is unknown to mmsegmentation; did you mean {' or '.join(near)}?")
    with _quiet():
        try:
            module: Any = build(words)
            if hasattr(module, "init_weights"):
                module.init_weights()
        except REFUSED as error:
            raise UserError(f"{key}.type={kind} cannot be built with {dict(words)}: {one_line(error)}") from error
    return module


def _check_kind(key: str, kind: str) -> None:
    """Refuse what mmsegmentation has, but not as a head that stands alone."""
    known = mmseg_modules().HEADS.module_dict
    # only now that the modules that these need are there
    from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    if kind in known and issubclass(known[kind], BaseCascadeDecodeHead):
        raise UserError(
            f"{key}.type={kind} refines another head's result, which is not supported; take one that stands alone"
        )
    if kind in known and not issubclass(known[kind], BaseDecodeHead) and not kind.startswith("Mask"):
        raise UserError(f"{key}.type={kind} is no decode head of mmsegmentation; take {USUAL_HEADS}")


@contextmanager
def _quiet() -> Iterator[None]:
    # mmengine tells of every parameter that it initialises
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
