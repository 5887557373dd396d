"""BiFormer-STL: bi-level routing attention in the layout of Swin-T.

Zhu, Wang, Ke, Zhang, Lau, CVPR 2023, arXiv 2303.08810: sec. 4.5 (ablation). Released code:
github.com/rayleizhu/BiFormer (MIT). It has two implementations with weights of their own, NHWC and NCHW; both load.

Deviations: the first implementation fails if `n_win` does not divide the sides of a feature map; here maps are padded,
as in BiFormer's dense-prediction models. Images with a side of less than 4 pixels are padded, and maps of one pixel
before downsampling. For regions of the second implementation see `blocks.FlooredBiLevelRouting`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import (
    BiLevelRouting,
    FlooredBiLevelRouting,
    FullAttention,
    Mlp,
    Residual,
    block,
    depthwise,
    drop_path_rates,
)
from ..blocks.padding import PadToSize
from ._backbone import Backbone, BackboneParts, Stage
from ._convolution import AS_LINEAR
from ._family import Family
from ._keymap import KeyRule
from ._registry import register

__all__ = ["BiFormerSTL", "BiFormerSTLConfig"]


@dataclass(frozen=True)
class BiFormerSTLConfig:
    """Settings of the released models.

    num_heads, topk: of stages 1-3; stage 4 has full attention with `full_heads` heads.
    n_win: regions per side of the feature map.
    edition: the implementation, "nhwc" or "nchw". They differ in stage 4, whose local convolution is on the input of
        the attention or on the values, in the regions of maps that n_win does not divide, and in the initialization.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    topk: tuple[int, ...] = (1, 4, 16)
    n_win: int = 7
    mlp_ratio: float = 4.0
    full_heads: int = 8
    edition: str = "nhwc"


class BiFormerSTL(Backbone):
    """Bi-level routing attention in stages 1-3 and full attention in stage 4, without position convolutions."""


tiny = partial(BiFormerSTLConfig, (96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12))

VARIANTS = {
    "biformer_stl_atto": BiFormerSTLConfig((16, 32, 64, 96), (1, 1, 2, 1), (1, 2, 4), topk=(1, 4, 8), n_win=4),
    "biformer_stl_tiny": tiny(),
    "biformer_stl_tiny_nchw": tiny(edition="nchw"),
}

norm = partial(LayerNorm2d, eps=1e-6)


def mixer(cfg: BiFormerSTLConfig, stage: int) -> nn.Module:
    if cfg.edition not in ("nhwc", "nchw"):
        raise ValueError(f"BiFormerSTL: edition={cfg.edition!r} must be 'nhwc' or 'nchw'")
    dim = cfg.dims[stage]
    if stage < 3:
        routing = BiLevelRouting if cfg.edition == "nhwc" else FlooredBiLevelRouting
        return routing(dim, num_heads=cfg.num_heads[stage], n_win=cfg.n_win, topk=cfg.topk[stage])
    place = "local" if cfg.edition == "nhwc" else "lepe"
    return FullAttention(dim, num_heads=cfg.full_heads, qkv_bias=False, **{place: depthwise(dim, kernel=5)})


def build(
    cfg: BiFormerSTLConfig,
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, dim in enumerate(cfg.dims):
        blocks = [
            block(
                mixer=Residual(mixer(cfg, i), norm=norm(dim), drop_path=rate),
                mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=rate),
            )
            for rate in rates[i]
        ]
        down = None
        if i:
            previous = cfg.dims[i - 1]
            down = block(norm=nn.BatchNorm2d(previous), pad=PadToSize(2), conv=nn.Conv2d(previous, dim, 2, 2))
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    # sides are rounded down, here and in the other stages
    conv = nn.Conv2d(in_chans, cfg.dims[0], 4, 4)
    return BackboneParts(
        stem=block(pad=PadToSize(4), conv=conv, norm=nn.BatchNorm2d(cfg.dims[0])),
        stages=stages,
        norm=nn.BatchNorm2d(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize if cfg.edition == "nhwc" else initialize_nchw,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialize_nchw(module: nn.Module) -> None:
    """The classifier as in the other edition; layers that are convolutions in this one keep PyTorch's default."""
    initialize(module)
    if isinstance(module, BiLevelRouting | FullAttention | Mlp):
        for layer in module.children():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()


def key_mapping(cfg: BiFormerSTLConfig) -> Sequence[KeyRule]:
    published, ours = "stages.{s}.blocks.{b}.", "stages.{s}.blocks.{b}."
    nchw = cfg.edition == "nchw"
    linear = {"attn.qkv_linear" if nchw else "attn.qkv.qkv": "mixer.fn.qkv"}
    linear |= {"attn.output_linear" if nchw else "attn.wo": "mixer.fn.proj"}
    linear |= {"mlp.0": "mlp.fn.fc1", "mlp.2": "mlp.fn.fc2"}
    plain = {"norm1": "mixer.norm", "attn.lepe": "mixer.fn.lepe", "norm2": "mlp.norm"}
    edit = AS_LINEAR if nchw else None
    last = "stages.3.blocks.{b}."
    return [
        # stage 4 has full attention, with other names
        KeyRule(last + "attn.qkv.weight", last + "mixer.fn.qkv.weight", edit),
        KeyRule(last + "attn.proj.{p}", last + "mixer.fn.proj.{p}", edit),
        KeyRule(last + "attn.lepe.{p}", last + f"mixer.fn.{'lepe' if nchw else 'local'}.{{p}}"),
        KeyRule("downsample_layers.0.0.{p}", "stem.conv.{p}"),
        KeyRule("downsample_layers.0.1.{p}", "stem.norm.{p}"),
        KeyRule("downsample_layers.{s}.0.{p}", "stages.{s}.down.norm.{p}"),
        KeyRule("downsample_layers.{s}.1.{p}", "stages.{s}.down.conv.{p}"),
        *(KeyRule(f"{published}{a}.{{p}}", f"{ours}{b}.{{p}}", edit) for a, b in linear.items()),
        *(KeyRule(f"{published}{a}.{{p}}", f"{ours}{b}.{{p}}") for a, b in plain.items()),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        BiFormerSTL,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2303.08810"},
    ),
    __name__,
)
