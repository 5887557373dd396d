"""LITv2: Fast Vision Transformers with HiLo Attention.

Pan, Cai, Zhuang, NeurIPS 2022, arXiv 2205.13213: sec. 4 (HiLo), 5 and table 1 of the appendix (architecture); the
deformable token merging is LITv1's (arXiv 2105.14217, sec. 3.3). Released code: github.com/ziplab/LITv2 (Apache-2.0);
its checkpoints load.

Deviations: the released classifiers accept square images of one size; here other sizes are padded as in the released
dense-prediction models, whose outputs are equal at that size. Their token merging makes an empty map of a side of one
pixel; here it is padded to two. The norms of the dense-prediction models are in `zoo.dense.DenseBackbone`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import DepthwiseMlp, HiLo, Residual, block, deformable_merge, drop_path_rates
from ..blocks.padding import PadToMultiple
from ._backbone import Backbone, BackboneParts, Stage
from ._family import DenseNorm, Family
from ._keymap import Edit, KeyRule
from ._registry import register

__all__ = ["LITv2", "LITv2Config"]


@dataclass(frozen=True)
class LITv2Config:
    """Columns of table 1 of the paper's appendix, one entry per stage; a window of 0 means no attention.

    windows: the released detectors use the same weights with a window of 2 or 4 in stage 3.
    alpha: fraction of the heads that are Lo-Fi.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[int, ...] = (0, 0, 2, 1)
    alpha: float = 0.9
    mlp_ratio: float = 4.0


class LITv2(Backbone):
    """HiLo attention in stages 3 and 4, only convolutional MLPs in stages 1 and 2."""


VARIANTS = {
    "litv2_atto": LITv2Config((16, 32, 64, 96), (1, 1, 2, 1), (1, 2, 4, 6)),
    "litv2_small": LITv2Config((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24)),
    "litv2_medium": LITv2Config((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)),
    "litv2_base": LITv2Config((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)),
    "litv2_base_384": LITv2Config((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)),
}

norm = partial(LayerNorm2d, eps=1e-5)


def build(
    cfg: LITv2Config, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, cfg.depths)
    stages = []
    for i, (dim, heads, window) in enumerate(zip(cfg.dims, cfg.num_heads, cfg.windows, strict=True)):
        blocks = []
        for rate in rates[i]:
            mlp = Residual(DepthwiseMlp(dim, ratio=cfg.mlp_ratio), norm=norm(dim), drop_path=rate)
            if window:
                hilo = HiLo(dim, num_heads=heads, window=window, alpha=cfg.alpha)
                blocks.append(block(mixer=Residual(hilo, norm=norm(dim), drop_path=rate), mlp=mlp))
            else:
                blocks.append(block(mlp=mlp))
        down = deformable_merge(cfg.dims[i - 1], dim) if i else None
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=down))
    return BackboneParts(
        stem=block(pad=PadToMultiple(4), conv=nn.Conv2d(in_chans, cfg.dims[0], 4, stride=4), norm=norm(cfg.dims[0])),
        stages=stages,
        norm=norm(cfg.dims[-1]),
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and module.groups > 1:
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def key_mapping(cfg: LITv2Config) -> Sequence[KeyRule]:
    merge = "layers.{s}.downsample.dconv."
    published, ours = "layers.{s}.blocks.{b}.", "stages.{s}.blocks.{b}."
    taps_before_channels = Edit(
        lambda weight: (weight.permute(0, 2, 3, 1).contiguous(),),
        lambda weight: (weight.permute(0, 3, 1, 2).contiguous(),),
    )
    return [
        KeyRule("patch_embed.proj.{p}", "stem.conv.{p}"),
        KeyRule("patch_embed.norm.{p}", "stem.norm.{p}"),
        KeyRule(merge + "weight", "stages.{s+1}.down.conv.weight", taps_before_channels),
        KeyRule(merge + "bias", "stages.{s+1}.down.conv.bias"),
        KeyRule(merge + "conv_offset.{p}", "stages.{s+1}.down.conv.offset.{p}"),
        KeyRule("layers.{s}.downsample.norm_layer.{p}", "stages.{s+1}.down.norm.{p}"),
        KeyRule(published + "norm1.{p}", ours + "mixer.norm.{p}"),
        *(
            KeyRule(published + f"attn.{layer}.{{p}}", ours + f"mixer.fn.{layer}.{{p}}")
            for layer in ("h_qkv", "h_proj", "l_q", "l_kv", "l_proj")
        ),
        KeyRule(published + "norm2.{p}", ours + "mlp.norm.{p}"),
        KeyRule(published + "mlp.fc1.{p}", ours + "mlp.fn.fc1.{p}"),
        KeyRule(published + "mlp.dwconv.dwconv.{p}", ours + "mlp.fn.dwconv.{p}"),
        KeyRule(published + "mlp.fc2.{p}", ours + "mlp.fn.fc2.{p}"),
        KeyRule("norm.{p}", "norm.{p}"),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]


register(
    Family(
        LITv2,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv", "paper_ids": "arXiv:2205.13213"},
        # as in the released segmenters; the detectors have no norm on the first map
        dense_norm=DenseNorm(norm, "norm{s}.{p}"),
    ),
    __name__,
)
