"""The options of mask-classification heads."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from ..recipe.schema import STRICT, Probability

# group norms have 32 groups; groups of one value would be normalized to zero on a map of one pixel
Width = Annotated[int, Field(ge=64, multiple_of=32)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaskOptions:
    """What all mask-classification heads take, with the names of transformers' Mask2FormerConfig."""

    num_queries: PositiveInt = 100
    """number of masks that the head predicts for an image"""
    mask_feature_size: PositiveInt = 256
    """channels of the map whose product with a query is the query's mask"""
    hidden_dim: Annotated[int, Field(ge=8, multiple_of=8)] = 256
    """channels of the queries"""
    num_attention_heads: PositiveInt = 8
    """heads of every attention"""
    dim_feedforward: PositiveInt = 2048
    """hidden width of the MLPs of the transformer decoder"""
    no_object_weight: NonNegativeFloat = 0.1
    """weight of queries without an object in the cross entropy"""
    class_weight: NonNegativeFloat = 2.0
    """weight of the cross entropy of the classes, in the loss and in the matching"""
    mask_weight: NonNegativeFloat = 5.0
    """weight of the cross entropy of the masks, in the loss and in the matching"""
    dice_weight: NonNegativeFloat = 5.0
    """weight of the dice loss of the masks, in the loss and in the matching"""
    train_num_points: PositiveInt = 12544
    """points of a mask at which the losses are computed"""
    oversample_ratio: Annotated[float, Field(ge=1)] = 3.0
    """times as many points are drawn, of which the most uncertain ones are taken"""
    importance_sample_ratio: Probability = 0.75
    """share of the points that are taken for their uncertainty; the others are random"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mask2FormerOptions(MaskOptions):
    """Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527)."""

    feature_size: Width = 256
    """channels of the pixel decoder"""
    encoder_layers: NonNegativeInt = 6
    """layers of deformable attention in the pixel decoder"""
    encoder_feedforward_dim: PositiveInt = 1024
    """hidden width of their MLPs"""
    decoder_layers: Annotated[int, Field(ge=4)] = 10
    """predictions of the transformer decoder: one before its first layer, and one after each; three layers or more,
    since each reads one of three maps"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout in both decoders"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PemOptions(MaskOptions):
    """PEM (Cavagnero et al., CVPR 2024, arXiv 2402.19422)."""

    feature_size: Annotated[int, Field(ge=2, multiple_of=2)] = 128
    """channels of the pixel decoder"""
    decoder_layers: Annotated[int, Field(ge=4)] = 7
    """predictions of the transformer decoder: one before its first layer, and one after each"""
    rescue: Literal["query", "image"] = "query"
    """what takes any pixel if no mask is left: the query itself, or as published all queries of an image together"""
