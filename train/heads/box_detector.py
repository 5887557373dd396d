"""Detectors of transformers that predict a set of boxes: RT-DETRv2, D-FINE and Deformable DETR.

The model of the library is built on the widths of a backbone, and reads the maps of the backbone itself afterwards: its
backbone is no part of the library's model, which would draw its weights anew and freeze its batch norms.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ...kernels.recording import exporting
from ..errors import UserError, one_line
from .library import library, quiet

# kind -> module of transformers, prefix of its classes
KINDS = {
    "rtdetrv2": ("rt_detr_v2", "RTDetrV2"),
    "d_fine": ("d_fine", "DFine"),
    "deformable_detr": ("deformable_detr", "DeformableDetr"),
}
STRIDES = (8, 16, 32)
PRIOR = 0.01  # probability of a class at the start, as in the focal loss' paper (arXiv 1708.02002, section 4.1)
# settings that follow from the backbone, the data or other keys, or that no head of ours supports
FIXED = {
    "deformable_detr": {"with_box_refine": True, "auxiliary_loss": True, "two_stage": False},
    **dict.fromkeys(("rtdetrv2", "d_fine"), {"auxiliary_loss": True, "freeze_backbone_batch_norms": False}),
}
RESERVED = {
    "d_model", "encoder_hidden_dim", "decoder_in_channels", "encoder_in_channels", "feat_strides", "backbone_config",
    "num_labels", "eval_size", "anchor_image_size", "tie_word_embeddings", "dilation", "num_channels",
}  # fmt: skip


class BackboneMaps(nn.Module):
    """Stands for the library's backbone: calls ours, which is a part of another module, and resizes the pixel mask."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.outside = [backbone]  # in a list, so that it is no part of this module

    def forward(self, images: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        maps = self.outside[0](images)
        masks = [nn.functional.interpolate(pixel_mask[None].float(), size=one.shape[-2:])[0].bool() for one in maps]
        return list(zip(maps, masks, strict=True))


class BoxDetector(nn.Module):
    """Images to class logits and boxes of queries, or with targets to losses."""

    def __init__(
        self, kind: str, backbone: nn.Module, channels: Sequence[int], classes: int, *, width: int, **more: Any
    ):
        """backbone: gives maps of strides 8, 16 and 32 with these channels; it stays a part of the caller's module.

        width: channels of the head; more: further settings, with the names of the library. Raises UserError naming
        task.detect.kwargs for wrong ones.
        """
        super().__init__()
        self.kind = kind
        self.library = build_library_model(kind, channels, classes, width, more)
        self.library.model.backbone = BackboneMaps(backbone)
        self.config = self.library.config
        for name, module in self.library.named_modules():
            if is_box_arithmetic(name):
                # boxes are refined in the dtype of these outputs; in bfloat16 they would be off by pixels
                module.register_forward_hook(lambda module, args, out: out.float())

    def forward(self, images: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, classes], and boxes [B, Q, 4] as center x, center y, width, height over the image's size.

        images: [B, 3, H, W], normalized; pixel_mask: [B, H, W], 1 on images and 0 on padding.
        """
        self.check_places(images)
        with recordable(self.library) if exporting() else nullcontext():
            found = self.library(pixel_values=images, pixel_mask=pixel_mask)
        return found.logits.float(), found.pred_boxes.float()

    def losses(self, images: Tensor, pixel_mask: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weighted losses by name, those of inner layers and of denoising queries summed.

        targets: class_labels [N], and boxes [N, 4] as `forward` gives them, for each image.
        """
        self.check_places(images)
        found = self.library(pixel_values=images, pixel_mask=pixel_mask, labels=targets)
        weights = {}
        if self.kind == "deformable_detr":  # whose parts have no weights
            weights = {"loss_bbox": self.config.bbox_loss_coefficient, "loss_giou": self.config.giou_loss_coefficient}
        losses: dict[str, Tensor] = {}
        for name, value in found.loss_dict.items():
            if name.startswith("loss"):
                part, group = group_of(name)
                losses[part + group] = losses.get(part + group, 0.0) + weights.get(part, 1.0) * value
        if (embedding := getattr(self.library.model, "denoising_class_embed", None)) is not None:
            # without objects, nothing else reads it, and DDP stops at parameters without a gradient
            losses["loss_bbox"] = losses["loss_bbox"] + 0 * embedding.weight.sum()
        return losses

    def check_places(self, images: Tensor) -> None:
        """Raises UserError if the maps have fewer places than there are queries, which are chosen among them."""
        height, width = images.shape[-2:]
        places = sum(-(-height // stride) * -(-width // stride) for stride in STRIDES)
        if self.kind != "deformable_detr" and places < self.config.num_queries:
            raise UserError(
                f"images of {height} x {width} pixels have {places} places for {self.config.num_queries} queries; use "
                "larger ones (data.size), or fewer queries: task.detect.kwargs={num_queries: 100}"
            )

    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings of queries, of levels and of denoising classes."""
        names = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        return names | {name for name, _ in self.named_parameters() if name.endswith("level_embed")}


@contextmanager
def recordable(model: nn.Module) -> Iterator[None]:
    """While a graph is recorded: the library's code without what runtimes do not have, or what fixes the batch.

    Its checks of sizes become operations that no runtime has, and `len` of a tensor is a number for the recorder.
    """
    modeling: Any = sys.modules[type(model).__module__]
    with (
        patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"),
        patch.object(modeling, "len", length, create=True),
    ):
        yield


def length(x: Any) -> int:
    """`len`, but of a tensor the size of its first axis, which may be open."""
    return x.shape[0] if isinstance(x, Tensor) else len(x)


def is_box_arithmetic(name: str) -> bool:
    """Whether the output of this module is added to boxes, or to what boxes begin with."""
    parents = ("class_embed", "bbox_embed", "decoder_input_proj")
    return name.rpartition(".")[2] in {"enc_score_head", "enc_bbox_head", "pre_bbox_head"} or any(
        name.rpartition(".")[0].endswith(parent) for parent in parents
    )


def group_of(name: str) -> tuple[str, str]:
    """("loss_bbox", "_aux") of "loss_bbox_aux_3" and "loss_bbox_3", and ("loss_bbox", "") of "loss_bbox"."""
    part = "_".join(name.split("_")[:2])
    rest = name.removeprefix(part)
    return part, "_dn" if rest.startswith("_dn") else "_aux" if rest else ""


@cache
def maps_config() -> Any:
    """The class of a config that tells the library the widths of our maps, registered with its empty backbone."""
    transformers = library("auto.configuration_auto"), library("auto.modeling_auto")
    import transformers.backbone_utils as utils
    from transformers import PreTrainedConfig, PreTrainedModel

    class MapsConfig(utils.BackboneConfigMixin, PreTrainedConfig):
        model_type = "tessel_maps"

        def __init__(self, channels: Sequence[int] = (1, 1, 1), **more: Any):
            self.channels = list(channels)
            self.stage_names = [f"stage{number}" for number in range(len(self.channels))]
            super().__init__(**more)
            self.set_output_features_output_indices(out_indices=list(range(len(self.channels))), out_features=None)

    class Maps(utils.BackboneMixin, PreTrainedModel):
        config_class = MapsConfig

        def __init__(self, config: Any):
            super().__init__(config)
            self.num_features = config.channels

    transformers[0].AutoConfig.register("tessel_maps", MapsConfig)
    transformers[1].AutoBackbone.register(MapsConfig, Maps)
    return MapsConfig


def build_library_model(kind: str, channels: Sequence[int], classes: int, width: int, given: Mapping[str, Any]) -> Any:
    """The library's detector with the initial weights of the published code, and without weights of two names."""
    folder, prefix = KINDS[kind]
    config_type = getattr(library(f"{folder}.configuration_{folder}"), f"{prefix}Config")
    model_type = getattr(library(f"{folder}.modeling_{folder}"), f"{prefix}ForObjectDetection")
    allowed = {field.name for field in dataclasses.fields(config_type)} & set(config_type.__annotations__)
    allowed -= RESERVED | set(FIXED[kind])
    if unknown := sorted(given.keys() - allowed):
        raise UserError(
            f"task.detect.kwargs: {unknown[0]} is no setting of {kind}, which takes {', '.join(sorted(allowed))}"
        )
    settings: dict[str, Any] = {"num_labels": classes, "d_model": width, **FIXED[kind], **given}
    if kind != "deformable_detr":
        settings |= {"encoder_hidden_dim": width, "decoder_in_channels": (width,) * len(STRIDES)}
        settings.setdefault("initializer_bias_prior_prob", PRIOR)
    try:
        with quiet():
            config = config_type(backbone_config=maps_config()(channels), tie_word_embeddings=False, **settings)
            model = model_type(config)
    except (StrictDataclassError, TypeError, ValueError, AssertionError, LookupError, RuntimeError) as error:
        raise UserError(
            f"task.detect.detector={kind} cannot be built with task.detect.channels={width} and "
            f"task.detect.kwargs={dict(given)}: {one_line(error)}"
        ) from error
    initialize(kind, model)
    return model


@torch.no_grad()
def initialize(kind: str, model: Any) -> None:
    """The initial weights of the published code where the library has others, and one name for each weight."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # RT-DETRv2: N(0, 0.01)
    decoder = model.model.decoder
    if kind == "deformable_detr":
        for number, (score, box) in enumerate(zip(model.class_embed, model.bbox_embed, strict=True)):
            nn.init.constant_(score.bias, -math.log((1 - PRIOR) / PRIOR))
            nn.init.zeros_(box.layers[-1].weight)
            nn.init.zeros_(box.layers[-1].bias)
            if number == 0:
                nn.init.constant_(box.layers[-1].bias[2:], -2.0)  # boxes begin small
        # the decoder refines boxes with the heads of the model: the same modules, which it does not own
        del decoder.bbox_embed
        decoder.bbox_embed = list(model.bbox_embed)
    else:
        # only those of the decoder are read
        del model.class_embed, model.bbox_embed
