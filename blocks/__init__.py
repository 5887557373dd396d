"""The modules that models are built from: token mixers (one file each), channel mixers, residual branches, stems.

Each module maps a feature map to a feature map, `forward(x: [B, C, H, W]) -> [B, C', H', W']`, for any H, W >= 1.
Feature maps are in channels_last memory, so that `x.permute(0, 2, 3, 1)` is a contiguous view and copies nothing.
"""

from .affine_scaled import AffineScaled
from .agent import Agent
from .aggregated import Aggregated
from .attentive_convolution import AttentiveConvolution
from .attentive_pooling import POOLINGS, AttentivePooling, EfficientPooling
from .auxiliary import AuxiliaryLoss, collect_losses
from .bi_level_routing import BiLevelRouting, FlooredBiLevelRouting
from .channel import Channel
from .cross_shaped_window import CrossShapedWindow
from .deform_merge import DeformableConv, deformable_merge
from .depthwise import depthwise, depthwise_pair
from .embed import CrossScale, NormMerge, PositionEmbedding, conv_norm
from .explanation import Explanation, explain, receptive_field
from .flow import Flow
from .frequency import AdaptiveFrequencyFilter
from .frequency_fusion import FrequencyFusion, FrequencyFusionConcat, FrequencyFusionPyramid
from .full_attention import FullAttention
from .gates import DeepLocalAttention, EfficientLocalAttention, GaussianGate, SubspaceGate
from .halo import Halo
from .hierarchical import Hierarchical
from .hilo import HiLo
from .inline import InLine
from .large_kernel import LargeKernel
from .length_scaled_cosine import LengthScaledCosine
from .linear_global import LinearGlobal
from .local_mhra import LocalMhra
from .long_short_distance import DynamicPositionBias, LongShortDistance
from .mixture_of_heads import HeadGates, MixtureOfHeads
from .mlp import ConvGlu, DepthwiseMlp, Mlp
from .neighborhood import NeighborhoodAttention
from .position_temperature import PositionTemperature
from .prototype_attention import PrototypeAttention
from .registry import MIXERS, Place, TokenMixer, token_mixer
from .residual import Residual, block, drop_path_rates
from .shifted_window import ShiftedWindow
from .spectral_gating import SpectralGating
from .strip import Strip
from .token_selection import MergeSelection, ScoreTokens, Selection, SelectTokens
from .window import Window
from .windows import Windows

__all__ = [
    "AdaptiveFrequencyFilter",
    "AffineScaled",
    "Agent",
    "Aggregated",
    "POOLINGS",
    "AttentiveConvolution",
    "AttentivePooling",
    "AuxiliaryLoss",
    "BiLevelRouting",
    "Channel",
    "ConvGlu",
    "CrossScale",
    "CrossShapedWindow",
    "DeepLocalAttention",
    "DeformableConv",
    "DepthwiseMlp",
    "DynamicPositionBias",
    "EfficientLocalAttention",
    "EfficientPooling",
    "Explanation",
    "FlooredBiLevelRouting",
    "Flow",
    "FrequencyFusion",
    "FrequencyFusionConcat",
    "FrequencyFusionPyramid",
    "FullAttention",
    "GaussianGate",
    "Halo",
    "HeadGates",
    "HiLo",
    "Hierarchical",
    "LargeKernel",
    "InLine",
    "LengthScaledCosine",
    "LinearGlobal",
    "MIXERS",
    "LocalMhra",
    "LongShortDistance",
    "MergeSelection",
    "MixtureOfHeads",
    "Mlp",
    "NeighborhoodAttention",
    "NormMerge",
    "Place",
    "PositionEmbedding",
    "PositionTemperature",
    "PrototypeAttention",
    "Residual",
    "ScoreTokens",
    "SelectTokens",
    "Selection",
    "ShiftedWindow",
    "SpectralGating",
    "Strip",
    "SubspaceGate",
    "TokenMixer",
    "Window",
    "Windows",
    "block",
    "collect_losses",
    "conv_norm",
    "deformable_merge",
    "depthwise",
    "depthwise_pair",
    "drop_path_rates",
    "explain",
    "receptive_field",
    "token_mixer",
]
