"""Decode heads and necks: mmsegmentation's own, built from its own words and what is known of backbone and data."""

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..openmmlab import build, mmseg_modules

STAGES = 4
SEVERAL = {"UPerHead", "FPNHead", "SegformerHead"}  # read several maps without being told to
# what goes wrong inside a constructor that is given other arguments than it takes
REFUSED = (TypeError, ValueError, AssertionError, KeyError, AttributeError, ImportError, RuntimeError, IndexError)


class Wanted:
    """A head of the recipe, `name` its key there: its words, and which maps it reads."""

    def __init__(self, name: str, words: Mapping[str, Any]):
        self.key, self.words = f"task.segment.{name}", dict(words)
        self.type = str(self.words.get("type"))
        self.several = self.type in SEVERAL or self.words.get("input_transform") is not None
        given = self.words.get("in_index")
        if given is None:
            given = list(range(STAGES)) if self.several else STAGES - 1 - (name == "auxiliary_head")
        indices = given if isinstance(given, list | tuple) else [given]
        if isinstance(given, list | tuple) != self.several or not all(type(i) is int for i in indices):
            reads = "several maps, so it is a list of numbers" if self.several else "one map, so it is one number"
            raise UserError(f"{self.key}.in_index={given}: {self.type} reads {reads}")
        if not indices or not all(-STAGES <= i < STAGES for i in indices):
            raise UserError(f"{self.key}.in_index={given} is not of the four maps 0, 1, 2, 3")
        self.indices = [i % STAGES for i in indices]

    @property
    def reads(self) -> set[int]:
        fine = self.type == "DepthwiseSeparableASPPHead" and self.words.get("c1_channels")
        return set(self.indices) | ({0} if fine else set())


def read_maps(heads: Iterable[Wanted], neck: Mapping[str, Any]) -> list[int]:
    """The stages of the backbone whose maps are read, rising."""
    if neck:
        return list(range(neck.get("start_level", 0), STAGES))
    return sorted(set().union(*(head.reads for head in heads)))


def build_neck(
    words: Mapping[str, Any], channels: list[int], strides: list[int], heads: Iterable[Wanted]
) -> tuple[nn.Module, list[int], list[int]]:
    """The neck, and the channels and strides of its maps."""
    words, key = dict(words), "task.segment.neck"
    if not isinstance(words.get("out_channels"), int):
        raise UserError(f"{key} needs out_channels, the width of the maps it hands out")
    words.setdefault("in_channels", channels)
    start = words.get("start_level", 0)
    outs = STAGES - start
    if words["type"] == "FPN":
        outs = words.setdefault("num_outs", outs)
    neck = _built(key, _plain(words))
    if unread := sorted(set(range(outs)) - set().union(*(head.reads for head in heads))):
        raise UserError(
            f"{key} hands out {outs} maps, of which no head reads {', '.join(map(str, unread))}: their weights would "
            "never learn; name them in task.segment.decode_head.in_index, or hand out fewer (start_level, num_outs)"
        )
    reached = [strides[start] * 2**number for number in range(outs)]
    return neck, [words["out_channels"]] * outs, reached


def build_head(
    wanted: Wanted, channels: list[int], strides: list[int], num_classes: int, weights: list[float] | None
) -> nn.Module:
    """The head, tried out on maps of a small image. Raises UserError naming it where it cannot be built or run."""
    words, key = _plain(wanted.words), wanted.key
    if max(wanted.reads) >= len(channels):
        raise UserError(f"{key}.in_index={wanted.indices}, but the neck hands out {len(channels)} maps")
    widths, several = [channels[i] for i in wanted.indices], wanted.several
    words["in_index"] = wanted.indices if several else wanted.indices[0]
    words.setdefault("in_channels", widths if several else widths[0])
    words.setdefault("norm_cfg", {"type": "BN", "requires_grad": True})
    words.setdefault("align_corners", False)
    words.setdefault("num_classes", num_classes)
    if words["num_classes"] != num_classes:
        raise UserError(
            f"{key}.num_classes={words['num_classes']}, but the data has {num_classes} classes; leave it out"
        )
    if wanted.type == "FPNHead":
        words.setdefault("feature_strides", [strides[i] for i in wanted.indices])
    if wanted.type == "DepthwiseSeparableASPPHead":
        words.setdefault("c1_in_channels", channels[0] if 0 in wanted.reads else 0)
        words.setdefault("c1_channels", 0)
    words["loss_decode"] = _losses(words.get("loss_decode", {"type": "CrossEntropyLoss"}), key, weights)
    _check_kind(key, wanted.type)
    head = _built(key, words)
    for loss in head.modules():
        if type(loss).__name__ == "CrossEntropyLoss" and not (loss.use_sigmoid or loss.use_mask):  # type: ignore[union-attr]
            loss.cls_criterion = cross_entropy  # type: ignore[assignment]
    _try_out(key, wanted, head, channels)
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
    losses = [dict(loss) for loss in (given if isinstance(given, list | tuple) else [given])]
    entropies = [loss for loss in losses if loss.get("type") == "CrossEntropyLoss"]
    for loss in entropies:
        loss.setdefault("avg_non_ignore", True)
        if weights is not None:
            loss.setdefault("class_weight", weights)
    if weights is not None and not entropies:
        kinds = ", ".join(str(loss.get("type")) for loss in losses)
        raise UserError(f"task.segment.class_weight has no effect with {key}.loss_decode of {kinds}; remove it")
    return losses if isinstance(given, list | tuple) else losses[0]


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
            "UPerHead, FPNHead or SegformerHead"
        )
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=3) or ["UPerHead", "FPNHead", "SegformerHead"]
        raise UserError(f"{key}.type={kind} is unknown to mmsegmentation; did you mean {' or '.join(near)}?")
    with _quiet():
        try:
            module: Any = build(words)
            if hasattr(module, "init_weights"):
                module.init_weights()
        except (UserError, *REFUSED) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{key}.type={kind} cannot be built with {dict(words)}: {reason}") from error
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
        raise UserError(
            f"{key}.type={kind} is no decode head of mmsegmentation; take UPerHead, FPNHead or SegformerHead"
        )


def _try_out(key: str, wanted: Wanted, head: Any, channels: list[int]) -> None:
    reads = wanted.reads
    maps = [torch.zeros(1, c, 16 >> i, 16 >> i) if i in reads else None for i, c in enumerate(channels)]
    training = head.training
    try:
        with torch.no_grad():
            head.eval().predict(maps, [{"img_shape": torch.Size((64, 64))}], None)
    except (UserError, *REFUSED) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}.type={wanted.type} does not run on the maps of this backbone: {reason}") from error
    finally:
        head.train(training)


@contextmanager
def _quiet() -> Iterator[None]:
    # mmengine tells of every parameter that it initialises
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
