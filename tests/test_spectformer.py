"""SpectFormer: sizes of the published models, the vanilla models' published layout, heads without token labels."""

import pytest
import timm
import torch

import tessel.zoo

# parameters as counted in the released code or printed in its logs
SIZES = {
    "spectformer_s": 22_226_928,
    "spectformer_b": 33_052_880,
    "spectformer_l": 54_675_792,
    "spectformer_vanilla_ti": 9_158_376,
    "spectformer_vanilla_xs": 20_028_520,
    "spectformer_vanilla_s": 32_449_768,
    "spectformer_vanilla_b": 57_159_656,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items(), ids=list(SIZES))
def test_sizes_of_the_published_models(name, size):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == size


def test_published_layout_of_the_vanilla_models():
    with torch.device("meta"):
        state = tessel.zoo.to_published(
            "spectformer_vanilla_s", timm.create_model("spectformer_vanilla_s").state_dict()
        )
    gates = [key for key in state if key.endswith("complex_weight")]
    assert gates == [f"blocks.{i}.filter.complex_weight" for i in range(4)]
    assert {tuple(state[key].shape) for key in gates} == {(14, 8, 384, 2)}
    assert state["blocks.18.attn.qkv.weight"].shape == (1152, 384) and state["pos_embed"].shape == (1, 196, 384)
    assert len(state) == 1 + 2 + 19 * 8 + 4 * 1 + 15 * 4 + 2 + 2


def test_spectral_blocks_of_the_vanilla_models_have_one_shortcut():
    model = timm.create_model("spectformer_vanilla_atto").eval()
    block, x = model.stages[0].blocks[0], torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        torch.nn.init.zeros_(block.fn.mixer.weight)
        y = block(x)
    torch.testing.assert_close(y - x, (y - x)[..., :1, :1].expand_as(x))


def test_without_token_labels_only_the_class_token_counts():
    whole = timm.create_model("spectformer_atto", num_classes=10).eval()
    model = timm.create_model("spectformer_atto", num_classes=10, token_labels=False).eval()
    state = {key: tensor for key, tensor in whole.state_dict().items() if not key.startswith("head.aux")}
    model.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = whole.forward_features(x)
        plain = whole.head.fc(tokens[:, 0])
        torch.testing.assert_close(model(x), plain)
        torch.testing.assert_close(whole(x), plain + whole.head.aux(tokens[:, 1:]).amax(1) / 2)
    assert whole.default_cfg["classifier"] == ("head.fc", "head.aux") and model.default_cfg["crop_pct"] == 0.96


def test_the_class_token_takes_the_norm_of_the_last_stage():
    model = timm.create_model("spectformer_atto", num_classes=10).eval()
    with torch.no_grad():
        model.stages[3].norm.norm.bias.fill_(7)
        model.stages[3].norm.norm.weight.zero_()
        assert (model.forward_features(torch.randn(1, 3, 64, 64)) == 7).all()
