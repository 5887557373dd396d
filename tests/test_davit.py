"""DaViT: its modules against the released code, checkpoints of timm's DaViT, parameter counts, the head."""

import golden
import pytest
import timm
import torch
from timm.models.davit import DaVit
from torch import nn

import tessel.zoo
from tessel.blocks import Channel, NormMerge, conv_norm
from tessel.zoo._backbone import Backbone
from tessel.zoo.davit import VARIANTS, DaViTConfig, Head, norm, pair

# parts of our keys -> parts of the released code's keys, within a module
PUBLISHED = {
    "mixer.norm": "norm1", "mixer.fn": "attn", "mlp.norm": "norm2", "mlp.fn": "mlp",
    "cpe1.fn": "cpe.0.proj", "cpe2.fn": "cpe.1.proj", "conv": "proj",
}  # fmt: skip


def spatial(window: int) -> nn.Module:
    return pair(DaViTConfig((32,), (1,), (4,), window=window), 0, (0.0, 0.0))[0]


def channel() -> nn.Module:
    return pair(DaViTConfig((32,), (1,), (4,)), 0, (0.0, 0.0))[1]


# a module, and the norm, sum, first and last element of the tokens [B, N, C] that the released code returns
CASES = {
    "ca": (lambda: Channel(32, num_heads=4), (43.475354541121, 8.802501354446, 0.234681948645, -0.102318899617)),
    "cb": (channel, (112.952035788313, -180.340416184791, -1.069037394339, -3.159205761622)),
    "sb-7": (lambda: spatial(7), (105.638186665546, 539.085691399095, -0.387193419788, -0.760248650013)),
    "sb-4": (lambda: spatial(4), (108.247155240492, 538.267965937634, -0.255996636970, -0.387628233672)),
    "pe": (
        lambda: conv_norm(3, 16, kernel=7, stride=4, norm=norm),
        (36.521794077139, 7.025674399952, -1.569731546232, -0.282672284157),
    ),
    "pd": (lambda: NormMerge(32, 48, norm=norm), (32.660840519358, -45.268456569831, 0.657649796495, -0.873852126961)),
}


@pytest.mark.parametrize("case", CASES)
def test_modules_return_what_the_released_code_returns(case):
    build, expected = CASES[case]
    module, prefix = build().double(), case.partition("-")[0]
    keys = {key: key for key in module.state_dict()}
    for ours, theirs in PUBLISHED.items():
        keys = {key: name.replace(ours, theirs) for key, name in keys.items()}
    shapes = [(f"{prefix}.{keys[key]}", value.shape) for key, value in module.state_dict().items()]
    state = golden.published_state({"state": shapes})
    module.load_state_dict({key: state[f"{prefix}.{keys[key]}"] for key in keys})
    x = (
        golden.draw("img", (1, 3, 30, 37))
        if case == "pe"
        else golden.draw("dav_in", (2, 45, 32)).mT.reshape(2, 32, 5, 9)
    )
    y = module(x).flatten(2).mT
    found = torch.stack([y.norm(), y.sum(), y[0, 0, 0], y[-1, -1, -1]])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-11)


def make(name: str) -> Backbone:
    model = timm.create_model(name)
    assert isinstance(model, Backbone)
    return model


def timm_davit(cfg: DaViTConfig) -> DaVit:
    return DaVit(
        depths=cfg.depths,
        embed_dims=cfg.dims,
        num_heads=cfg.num_heads,
        window_size=cfg.window,
        mlp_ratio=cfg.mlp_ratio,
    )


@pytest.mark.parametrize("name", ["tessel_davit_atto", pytest.param("tessel_davit_tiny", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [(64, 64), (97, 150)], ids=str)
def test_outputs_equal_timms_with_the_same_weights(name, size):
    theirs = timm_davit(VARIANTS[name]).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    ours = make(name).double().eval()
    ours.load_state_dict(tessel.zoo.from_published(name, theirs.state_dict()))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
        for got, want in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_checkpoint_with_timms_keys_loads(tmp_path):
    name = "tessel_davit_atto"
    theirs = timm_davit(VARIANTS[name]).eval()
    torch.save(theirs.state_dict(), tmp_path / "davit.pth")
    overlay = {"file": str(tmp_path / "davit.pth")}
    ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tessel_davit_tiny", 28_360_168),
        ("tessel_davit_small", 49_745_896),
        ("tessel_davit_base", 87_954_408),
        ("tessel_davit_large", 196_811_752),
    ],
)
def test_parameter_counts(name, count):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


def test_head_pools_before_it_normalizes():
    head = Head(8, 5, pool_type="avg", drop_rate=0.0).double()
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64)
    mean = x.flatten(2).mean(-1)
    expected = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), head.fc(expected))
    torch.testing.assert_close(head(x, pre_logits=True), expected)


def test_head_normalizes_each_of_two_pooled_vectors():
    head = Head(8, 5, pool_type="catavgmax", drop_rate=0.0)
    single = {kind: Head(8, 5, pool_type=kind, drop_rate=0.0) for kind in ("avg", "max")}
    x = torch.randn(2, 8, 4, 3)
    expected = torch.cat([single[kind](x, pre_logits=True) for kind in ("avg", "max")], 1)
    torch.testing.assert_close(head(x, pre_logits=True), expected)
    assert head(x).shape == (2, 5) and head.num_features == 16


def test_head_without_classifier_and_pooling_has_no_parameters():
    head = Head(8, 5, pool_type="avg", drop_rate=0.0)
    x = torch.randn(2, 8, 4, 3)
    kept = head.norm
    head.reset(3, in_features=8)
    assert head.norm is kept
    head.reset(0, "", in_features=8)
    assert not list(head.parameters())
    assert torch.equal(head(x), x)
    head.reset(4, "avg", in_features=8)
    assert head(x).shape == (2, 4)
    head.reset(4, in_features=6)
    assert head(x[:, :6]).shape == (2, 4)


def test_feature_extractor_has_no_unused_parameter():
    model = timm.create_model("tessel_davit_atto", features_only=True)
    torch.stack([m.square().mean() for m in model(torch.randn(1, 3, 64, 64))]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
