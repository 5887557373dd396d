"""HaloNet: Scaling Local Self-Attention for Parameter Efficient Visual Backbones.

Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens, CVPR 2021, arXiv 2103.12731: halo attention and the
table of variants H0 to H7. No code was released; the reference is timm's implementation (Apache-2.0), whose checkpoints
load. Its halonet_h1, halonet26t, halonet50ts and sehalonet33ts are registered here as `tessel_halonet_h1` and so on.

Deviations: timm's models fail if the block size does not divide a feature map; here the attention pads it. The paper
does not give heads and activation of all variants: H0 and H2 to H7 have those of timm's H1 (8 heads, ReLU).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from timm.layers import ClassifierHead, DropPath, SEModule, make_divisible
from torch import Tensor, nn

from ..blocks import Halo, block, drop_path_rates
from ._backbone import Backbone, BackboneParts, Stage
from ._convolution import ConvNormAct, FinalConvHead, activation, initialize_conv
from ._family import Family
from ._keymap import Edit, KeyRule
from ._registry import register

__all__ = ["HaloNet", "HaloNetConfig"]


@dataclass(frozen=True)
class HaloNetConfig:
    """Columns of the paper's table of variants; `stages`, `rb`, `widths` and `num_heads` have one entry per stage.

    stages: the blocks of each stage, A for attention, C for a 3x3 convolution in its place.
    widths: base width w. Queries have width w, values `rv` * w, the output of a block `rb` * w.
    df: width of the last 1x1 convolution, 0 for none.
    stem: widths of the convolutions of the stem; stem_pool: whether max pooling follows them.
    se: squeeze-and-excitation in C blocks.
    mask_border: mask positions outside the feature map; in the published models they are keys and values of zero.
    """

    stages: tuple[str, ...]
    block_size: int = 8
    halo_size: int = 3
    rv: float = 1.0
    rb: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    df: int = 0
    widths: tuple[int, ...] = (64, 128, 256, 512)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    stem: tuple[int, ...] = (64,)
    stem_kernel: int = 7
    stem_pool: bool = True
    act: str = "relu"
    se: bool = False
    mask_border: bool = False

    def __post_init__(self):
        for stage in self.stages:
            if not stage or set(stage) - set("AC"):
                raise ValueError(f"HaloNet: stages={self.stages} must consist of A (attention) and C (convolution)")
        for column in ("rb", "widths", "num_heads"):
            if len(getattr(self, column)) != len(self.stages):
                raise ValueError(f"HaloNet: {column}={getattr(self, column)} must have {len(self.stages)} entries")


class HaloNet(Backbone):
    """A ResNet with halo attention in place of some or all 3x3 convolutions."""


VARIANTS = {
    "tessel_halonet_atto": HaloNetConfig(
        ("C", "CA", "AA", "A"),
        block_size=4,
        halo_size=1,
        rv=2.0,
        rb=(2.0,) * 4,
        df=128,
        widths=(16, 24, 32, 48),
        num_heads=(2, 3, 4, 6),
        stem=(8, 12, 16),
        stem_kernel=3,
        act="silu",
        se=True,
    ),
    "tessel_halonet_h0": HaloNetConfig(("AAA", "AAA", "A" * 7, "AAA"), rb=(0.5,) * 4),
    "tessel_halonet_h1": HaloNetConfig(("AAA", "AAA", "A" * 10, "AAA")),
    "tessel_halonet_h2": HaloNetConfig(("AAA", "AAA", "A" * 11, "AAA"), rb=(1.25,) * 4),
    "tessel_halonet_h3": HaloNetConfig(("AAA", "AAA", "A" * 12, "AAA"), block_size=10, rb=(1.5,) * 4, df=1024),
    "tessel_halonet_h4": HaloNetConfig(
        ("AAA", "AAA", "A" * 12, "AAA"), block_size=12, halo_size=2, rb=(3.0,) * 4, df=1280
    ),
    "tessel_halonet_h5": HaloNetConfig(("AAA", "AAA", "A" * 23, "AAA"), 14, 2, rv=2.5, rb=(2.0,) * 4, df=1536),
    "tessel_halonet_h6": HaloNetConfig(("AAA", "AAA", "A" * 24, "AAA"), 8, 4, rv=3.0, rb=(2.75,) * 4, df=1536),
    "tessel_halonet_h7": HaloNetConfig(("AAA", "AAA", "A" * 26, "AAA"), 10, 3, rv=4.0, rb=(3.5,) * 4, df=2048),
    "tessel_halonet26t": HaloNetConfig(
        ("CC", "CC", "CA", "AA"), halo_size=2, rb=(4.0,) * 4, stem=(24, 32, 64), stem_kernel=3
    ),
    "tessel_halonet50ts": HaloNetConfig(
        ("CCC", "CCCA", "CACACA", "CAC"),
        rb=(4.0,) * 4,
        num_heads=(8, 4, 8, 8),
        stem=(24, 32, 64),
        stem_kernel=3,
        act="silu",
    ),
    "tessel_sehalonet33ts": HaloNetConfig(
        ("CC", "CCA", "CCA", "AA"),
        rb=(4.0, 4.0, 4.0, 3.0),
        df=1280,
        stem=(24, 32, 64),
        stem_kernel=3,
        stem_pool=False,
        act="silu",
        se=True,
    ),
}


class Bottleneck(nn.Module):
    """`act(branch(x) + shortcut(x))`: `[B, in_chs, H, W] -> [B, out_chs, ceil(H/stride), ceil(W/stride)]`."""

    def __init__(self, branch: nn.Module, *, in_chs: int, out_chs: int, stride: int, act: str, drop_path: float):
        super().__init__()
        self.branch = branch
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        changes = in_chs != out_chs or stride != 1
        self.shortcut = ConvNormAct(in_chs, out_chs, stride=stride) if changes else nn.Identity()
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.branch(x))
        # in place: autograd does not need the branch's result, and allocating a new map costs more than the sum
        y += self.shortcut(x)
        return self.act(y)


def stem(cfg: HaloNetConfig, in_chans: int) -> nn.Sequential:
    """`[B, in_chans, H, W] -> [B, C, ~H/4, ~W/4]`: convolutions, two of them strided, or one and then max pooling."""
    layers = block()
    last = len(cfg.stem) - 1
    for i, (in_chs, width) in enumerate(zip((in_chans, *cfg.stem), cfg.stem, strict=False)):
        stride = 2 if i == 0 or (i == last and not cfg.stem_pool) else 1
        conv = ConvNormAct(in_chs, width, kernel=cfg.stem_kernel, stride=stride, act=cfg.act)
        layers.add_module(f"conv{i + 1}", conv)
    if cfg.stem_pool:
        layers.add_module("pool", nn.MaxPool2d(3, 2, 1))
    return layers


def bottleneck(cfg: HaloNetConfig, stage: int, kind: str, *, in_chs: int, stride: int, drop_path: float) -> Bottleneck:
    width, heads = cfg.widths[stage], cfg.num_heads[stage]
    out_chs = make_divisible(width * cfg.rb[stage])
    parts: dict[str, nn.Module] = {"reduce": ConvNormAct(in_chs, width, act=cfg.act)}
    if kind == "A":
        mixed = int(width * cfg.rv)
        parts["mixer"] = Halo(
            width,
            num_heads=heads,
            out_dim=mixed,
            head_dim=width // heads,
            block_size=cfg.block_size,
            halo_size=cfg.halo_size,
            stride=stride,
            mask_border=cfg.mask_border,
        )
        parts["norm"], parts["act"] = nn.BatchNorm2d(mixed), activation(cfg.act)
    else:
        mixed = width
        parts["conv"] = ConvNormAct(width, width, kernel=3, stride=stride, act=cfg.act)
        if cfg.se:
            parts["se"] = SEModule(width)
    branch = block(**parts, expand=ConvNormAct(mixed, out_chs))
    return Bottleneck(branch, in_chs=in_chs, out_chs=out_chs, stride=stride, act=cfg.act, drop_path=drop_path)


def build(
    cfg: HaloNetConfig, *, in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path_rate: float
) -> BackboneParts:
    rates = drop_path_rates(drop_path_rate, [len(kinds) for kinds in cfg.stages])
    stages, in_chs = [], cfg.stem[-1]
    for i, kinds in enumerate(cfg.stages):
        blocks = []
        for j, (kind, rate) in enumerate(zip(kinds, rates[i], strict=True)):
            stride = 2 if i and not j else 1
            blocks.append(bottleneck(cfg, i, kind, in_chs=in_chs, stride=stride, drop_path=rate))
            in_chs = make_divisible(cfg.widths[i] * cfg.rb[i])
        stages.append(Stage(blocks, dim=in_chs, stride=2 if i else 1))
    if cfg.df and (num_classes or global_pool):
        head = FinalConvHead(in_chs, cfg.df, num_classes, act=cfg.act, pool_type=global_pool, drop_rate=drop_rate)
    else:
        head = ClassifierHead(in_chs, num_classes, pool_type=global_pool, drop_rate=drop_rate)
    return BackboneParts(stem=stem(cfg, in_chans), stages=stages, head=head, init=initialize)


def initialize(module: nn.Module) -> None:
    if isinstance(module, Bottleneck):
        # at the start a block returns its shortcut
        nn.init.zeros_(module.branch.get_parameter("expand.norm.weight"))
    elif isinstance(module, nn.Conv2d):
        initialize_conv(module)
    elif isinstance(module, nn.Linear) and module.bias is not None:
        # the classifier: the projections of the attention have no bias
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


# weights of published 1x1 convolutions <-> our linear layers
as_linear = Edit(lambda w: (w.flatten(1),), lambda w: (w[:, :, None, None],))


def conv_norm_rules(published: str, ours: str) -> list[KeyRule]:
    return [KeyRule(published + "conv.{p}", ours + "conv.{p}"), KeyRule(published + "bn.{p}", ours + "norm.{p}")]


def key_mapping(cfg: HaloNetConfig) -> Sequence[KeyRule]:
    published, ours = "stages.{s}.{b}.", "stages.{s}.blocks.{b}."
    return [
        *conv_norm_rules("stem.conv{i}.", "stem.conv{i}."),
        *conv_norm_rules(published + "conv1_1x1.", ours + "branch.reduce."),
        *conv_norm_rules(published + "conv2_kxk.", ours + "branch.conv."),
        KeyRule(published + "attn.fc1.{p}", ours + "branch.se.fc1.{p}"),
        KeyRule(published + "attn.fc2.{p}", ours + "branch.se.fc2.{p}"),
        KeyRule(published + "self_attn.q.weight", ours + "branch.mixer.q.weight", as_linear),
        KeyRule(published + "self_attn.kv.weight", ours + "branch.mixer.kv.weight", as_linear),
        KeyRule(published + "self_attn.pos_embed.{p}", ours + "branch.mixer.{p}"),
        KeyRule(published + "post_attn.{p}", ours + "branch.norm.{p}"),
        *conv_norm_rules(published + "conv3_1x1.", ours + "branch.expand."),
        *conv_norm_rules(published + "shortcut.", ours + "shortcut."),
        *conv_norm_rules("final_conv.", "head.final_conv."),
        KeyRule("head.fc.{p}", "head.fc.{p}"),
    ]


# image side and ImageNet-1K top-1 as reported in the paper
REPORTED = {
    "tessel_halonet_h0": (256, 77.9),
    "tessel_halonet_h1": (256, 79.9),
    "tessel_halonet_h2": (256, 80.4),
    "tessel_halonet_h3": (320, 81.9),
    "tessel_halonet_h4": (384, 83.3),
    "tessel_halonet_h5": (448, 84.0),
    "tessel_halonet_h6": (512, 84.4),
    "tessel_halonet_h7": (600, 84.9),
}

register(
    Family(
        HaloNet,
        VARIANTS,
        build,
        key_mapping,
        pretrained_cfg={"first_conv": "stem.conv1.conv", "crop_pct": 0.94, "paper_ids": "arXiv:2103.12731"},
        reported=REPORTED,
    ),
    __name__,
)
