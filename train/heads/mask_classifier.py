"""Mask classification: a set of queries, each with a class and a mask (Mask2Former, arXiv 2112.01527).

A `MaskClassifier` is a pixel decoder, a transformer decoder and a linear classifier. The pixel decoder and the
transformer decoder are modules with the interface of transformers' Mask2Former, by default its own; another pair is
plugged in by handing other modules to the constructor.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .library import library, quiet
from .mask_options import Mask2FormerOptions

STRIDES = (4, 8, 16, 32)


class MaskOutputs(NamedTuple):
    """The predictions of a mask classifier, from its first to its last layer."""

    classes: list[Tensor]
    """logits [B, Q, classes + 1]; the last column is "no object" """
    masks: list[Tensor]
    """logits [B, Q, h, w], where h and w are the height and width of the finest map"""


class MaskClassifier(nn.Module):
    """Maps of a backbone, from fine to coarse, to classes and masks of queries.

    pixel_decoder: called with the list of maps [B, C, H / stride, W / stride]; its result has the attributes
        `mask_features` [B, M, h, w] and `multi_scale_features`, three maps from coarse to fine.
    decoder: called with `multi_scale_features` and `mask_features`; its result has the attributes
        `intermediate_hidden_states`, the queries [Q, B, D] of each prediction, and `masks_queries_logits`, their masks
        [B, Q, h, w].
    """

    def __init__(self, pixel_decoder: nn.Module, decoder: nn.Module, *, width: int, classes: int):
        """width: D, of the queries; classes: without "no object"."""
        super().__init__()
        self.pixel_decoder, self.decoder = pixel_decoder, decoder
        self.class_predictor = nn.Linear(width, classes + 1)
        self.num_classes = classes

    def forward(self, features: Sequence[Tensor]) -> MaskOutputs:
        pixels = self.pixel_decoder(list(features))
        found = self.decoder(multi_scale_features=pixels.multi_scale_features, mask_features=pixels.mask_features)
        classes = [self.class_predictor(queries.transpose(0, 1)) for queries in found.intermediate_hidden_states]
        return MaskOutputs(classes, list(found.masks_queries_logits))

    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings: of the queries, and of the levels."""
        embeddings = {name for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        levels = {name for name, _ in self.named_parameters() if name.endswith("level_embed")}
        return {f"{name}.weight" for name in embeddings} | levels


def mask2former_config(options: Mask2FormerOptions, classes: int, strides: Sequence[int] = STRIDES) -> Any:
    """transformers' Mask2FormerConfig. strides: of the four maps of the backbone."""
    with quiet():
        return library("mask2former").Mask2FormerConfig(
            **asdict(options), num_labels=classes, feature_strides=tuple(strides), common_stride=strides[0]
        )


def mask2former_parts(
    options: Mask2FormerOptions, classes: int, channels: Sequence[int], strides: Sequence[int]
) -> tuple[nn.Module, nn.Module]:
    """transformers' pixel decoder and transformer decoder, with the initial weights of the published code.

    channels, strides: of the four maps of the backbone, from fine to coarse.
    """
    config = mask2former_config(options, classes, strides)
    modeling = library("mask2former.modeling_mask2former")

    class Parts(modeling.Mask2FormerPreTrainedModel):
        """Both decoders, to initialize them with the library's function."""

        def __init__(self) -> None:
            super().__init__(config)
            self.pixel_decoder = modeling.Mask2FormerPixelDecoder(config, feature_channels=list(channels))
            self.decoder = modeling.Mask2FormerTransformerModule(in_features=config.feature_size, config=config)

    with quiet(), torch.no_grad():
        parts = Parts()
        # `post_init` passes over modules without parameters of their own, if a class is not of transformers
        parts.apply(parts._init_weights)
    initialize_pixel_decoder(parts.pixel_decoder)
    # read by the layers of the pixel decoder only; a parameter without a gradient would stop DDP and resuming
    parts.pixel_decoder.level_embed.requires_grad_(options.encoder_layers > 0)
    return parts.pixel_decoder, parts.decoder


def initialize_pixel_decoder(decoder: Any) -> None:
    """Draw the convolutions and MLPs as the published code does; transformers draws them from N(0, 0.02).

    Projections and MLPs: Xavier uniform. Convolutions of the feature pyramid: uniform by their fan in (`c2_xavier_fill`
    of fvcore).
    """
    for projection in decoder.input_projections:
        nn.init.xavier_uniform_(projection[0].weight)
    for layer in decoder.encoder.layers:
        nn.init.xavier_uniform_(layer.fc1.weight)
        nn.init.xavier_uniform_(layer.fc2.weight)
    for part in (*decoder.lateral_convolutions, *decoder.output_convolutions, [decoder.mask_projection]):
        nn.init.kaiming_uniform_(part[0].weight, a=1)
