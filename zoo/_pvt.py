"""The layout of the Pyramid Vision Transformer (Wang et al., arXiv 2102.12122), a host for any token mixer.

Each of the four stages begins with a patch embedding and a position embedding, which is resized bilinearly for other
image sizes. The attention of PVT, with keys from a smaller map, and its class token are not part of the layout.
"""

from dataclasses import dataclass
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, trunc_normal_
from torch import nn

from ..blocks import Mlp, PositionEmbedding, Residual, block, drop_path_rates
from ..blocks.padding import PadToSize
from ._backbone import BackboneParts, Branch, Stage
from ._keymap import PACK_QKV, KeyRule, MixerKeys, transformer_keys

PATCHES = (4, 2, 2, 2)
norm = partial(LayerNorm2d, eps=1e-6)
embed_norm = partial(LayerNorm2d, eps=1e-5)


@dataclass(frozen=True)
class PVTConfig:
    """Columns of the paper's table; `img_size` is that of the position embeddings."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    img_size: int = 224


def patch_embed(in_chs: int, dim: int, *, patch: int, trained_size: int) -> nn.Sequential:
    """`[B, in_chs, H, W] -> [B, dim, H // patch, W // patch]`, at least 1 x 1."""
    return block(
        pad=PadToSize(patch),
        conv=nn.Conv2d(in_chs, dim, patch, patch),
        norm=embed_norm(dim),
        position=PositionEmbedding(dim, trained_size=trained_size),
    )


def pvt(
    cfg: PVTConfig,
    branch: Branch,
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
) -> BackboneParts:
    """A PVT whose token mixers are the modules of `branch`."""
    embeds = [
        patch_embed(in_chs, dim, patch=patch, trained_size=cfg.img_size // (4 << i))
        for i, (in_chs, dim, patch) in enumerate(zip((in_chans, *cfg.dims), cfg.dims, PATCHES, strict=False))
    ]
    stages = []
    for i, rates in enumerate(drop_path_rates(drop_path_rate, cfg.depths)):
        dim = cfg.dims[i]
        blocks = [
            block(
                mixer=branch(i, j, rate),
                mlp=Residual(Mlp(dim, ratio=cfg.mlp_ratios[i]), norm=norm(dim), drop_path=rate),
            )
            for j, rate in enumerate(rates)
        ]
        stages.append(Stage(blocks, dim=dim, stride=2 if i else 1, down=embeds[i] if i else None))
    return BackboneParts(
        stem=embeds[0],
        stages=stages,
        head=ClassifierHead(cfg.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
        init=initialize,
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def pvt_keys(mixer_keys: MixerKeys) -> list[KeyRule]:
    """The rules of the layout and those of the mixers."""
    published, ours = "block{s+1}.{b}.", "stages.{s}.blocks.{b}."
    return [
        KeyRule("pos_embed1", "stem.position.table"),
        KeyRule("patch_embed1.proj.{p}", "stem.conv.{p}"),
        KeyRule("patch_embed1.norm.{p}", "stem.norm.{p}"),
        KeyRule("pos_embed{s+1}", "stages.{s}.down.position.table"),
        KeyRule("patch_embed{s+1}.proj.{p}", "stages.{s}.down.conv.{p}"),
        KeyRule("patch_embed{s+1}.norm.{p}", "stages.{s}.down.norm.{p}"),
        # the published mixers have one layer for q and one for k and v
        KeyRule([published + "attn.q.{p}", published + "attn.kv.{p}"], ours + "mixer.fn.qkv.{p}", PACK_QKV),
        *mixer_keys(published + "attn.", ours + "mixer.fn."),
        *transformer_keys(published, ours),
        KeyRule("head.{p}", "head.fc.{p}"),
    ]
