"""The segmenter: a backbone, and on its maps a neck and heads in mmsegmentation's own modules and names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ....checkpoints import read_state
from ....zoo.dense import DenseBackbone, prefix_patterns
from ...errors import UserError
from ...recipe.schema import Dense, Model, Recipe
from ..dense_backbone import build_backbone, check_backbone, load_initial_backbone
from ..models import check_name
from .head_checks import FeatureSpec, layout
from .heads import HeadConfig, build_head, build_neck, read_maps
from .options import SegmentOptions

PREFIXES = ("neck.", "decode_head.", "auxiliary_head.")


class Segmenter(nn.Module):
    """Images [B, 3, H, W] to logits [B, classes, H, W]; with masks [B, H, W] to the parts of the loss.

    Parameters are named as in mmsegmentation: backbone, neck, decode_head, auxiliary_head.
    """

    def __init__(
        self,
        backbone: DenseBackbone,
        decode_head: nn.Module,
        *,
        neck: nn.Module | None = None,
        auxiliary_head: nn.Module | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        if neck is not None:
            self.neck = neck
        self.decode_head = decode_head
        if auxiliary_head is not None:
            self.auxiliary_head = auxiliary_head
        self.pretrained_cfg = backbone.pretrained_cfg
        self.classes: list[str] = []
        self.palette: list[list[int]] = []

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Any:
        maps = self.maps(images)
        if masks is None:
            head: Any = self.decode_head
            return head.predict(maps, [{"img_shape": images.shape[-2:]}], None)
        samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=mask[None])) for mask in masks]
        losses = {}
        for name in ("decode", "auxiliary"):
            if (head := getattr(self, f"{name}_head", None)) is not None:
                losses |= {f"{name}.{key}": value.squeeze() for key, value in head.loss(maps, samples, None).items()}
        return losses

    def maps(self, images: Tensor) -> list[Tensor | None]:
        """What the heads see, numbered as mmsegmentation does: a stage without a reader is None."""
        maps: list[Tensor | None] = [None] * 4
        for level, found in zip(self.backbone.out_indices, self.backbone(images), strict=True):
            maps[level] = found
        return list(self.neck(maps)) if hasattr(self, "neck") else maps

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the backbone; the heads are not written for it."""
        self.backbone.compile(*args, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups of the backbone under the names they have here; all else counts as the last layer."""
        groups = self.backbone.group_matcher(coarse=coarse)
        return {key: prefix_patterns(spec, "backbone.") for key, spec in groups.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay beside biases and one-dimensional ones."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a published segmenter, whose names are mmsegmentation's and the paper's.

        Raises ValueError naming what is missing, unknown or of another shape.
        """
        rest = {key.removeprefix("module."): tensor for key, tensor in self.backbone.load_published(state).items()}
        own = {key: tensor for key, tensor in self.state_dict().items() if key.startswith(PREFIXES)}
        for words, keys in (("does not know", rest.keys() - own.keys()), ("asks for", own.keys() - rest.keys())):
            if keys:
                raise ValueError(f"{len(keys)} weights that this recipe {words}: {', '.join(sorted(keys)[:5])}")
        for key, tensor in rest.items():
            if tensor.shape != own[key].shape:
                raise ValueError(f"{key} is {list(tensor.shape)} there, {list(own[key].shape)} by this recipe")
        self.load_state_dict(self.state_dict() | rest)


def assemble(
    model: Model, segment: SegmentOptions, *, dense: Dense, classes: Sequence[str], size: int | None = None
) -> Segmenter:
    """The segmenter of a recipe's sections. Raises UserError for what cannot be built, or trained on `size` pixels.

    Only what a head reads is built: a parameter without a gradient would stop the training on several processes.
    """
    if unknown := sorted(segment.class_weight.keys() - set(classes)):
        raise UserError(
            f"task.segment.class_weight names {', '.join(unknown)}, but the classes of the data are "
            f"{', '.join(classes[:12])}{', ...' * (len(classes) > 12)}"
        )
    weights = [segment.class_weight.get(name, 1.0) for name in classes] if segment.class_weight else None
    parts = {"decode_head": segment.decode_head, "auxiliary_head": segment.auxiliary_head}
    wanted = {name: HeadConfig(name, part) for name, part in parts.items() if part}
    levels = read_maps(wanted.values(), segment.neck)
    check_name(model.name)
    backbone = build_backbone(model, dense, levels)
    maps = seen_maps(backbone, model, size)
    neck = None
    if segment.neck:
        neck, maps[:] = build_neck(segment.neck, maps, wanted.values())
    heads = {name: build_head(one, maps, len(classes), weights, size) for name, one in wanted.items()}
    return Segmenter(backbone, heads.pop("decode_head"), neck=neck, **heads)


def seen_maps(backbone: DenseBackbone, model: Model, size: int | None) -> list[FeatureSpec | None]:
    """What is known of the maps of the four stages; of `size`, also that the backbone takes it, and how maps lie."""
    maps: list[FeatureSpec | None] = [None] * 4
    for level, width, stride in zip(backbone.out_indices, backbone.channels, backbone.strides, strict=True):
        maps[level] = FeatureSpec(width, stride)
    if size is not None:
        remedy = (
            f"if it has a size of its own, give it model.kwargs.strict_img_size=false or model.kwargs.img_size={size}, "
            "or data.size that size; else take another model"
        )
        for level, found in zip(
            backbone.out_indices, check_backbone(backbone, model, (size, size), remedy), strict=True
        ):
            maps[level] = FeatureSpec(
                found.shape[1], backbone.strides[backbone.out_indices.index(level)], layout(found)
            )
    return maps


def begin(segmenter: Segmenter, recipe: Recipe) -> None:
    """Give `segmenter` the weights that the recipe begins with: a classifier's, or a published segmenter's."""
    model, published = recipe.model, recipe.task.segment.load_from
    check_name(model.init_from, "model.init_from")
    load_initial_backbone(segmenter.backbone, model, recipe.data.size)
    if published:
        try:
            segmenter.load_published(read_state(Path(published)))
        except (ValueError, OSError) as error:
            raise UserError(
                f"task.segment.load_from={published} does not fit model.name={model.name} and its heads: {error}"
            ) from error
