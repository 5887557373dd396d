"""The lab: every mixer in every stage has timm's contract; specifications round-trip, and wrong ones are explained."""

import copy
import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay

from tessel.blocks import MIXERS, Place
from tessel.zoo import lab
from tessel.zoo._specification import parse_mixers

EXAMPLE = "cross_shaped_window(stripe_width=7) | hilo(alpha=0.9) | bi_level_routing(topk=4), channel | full_attention"
OPTIONS = [
    {"stem": "convolutional", "norm": "batch", "depth": (1, 2, 1, 1)},
    {"channel_mixer": "depthwise", "position": "depthwise", "heads": (1, 2, 3, 4)},
    {"channel_mixer": "convolutional_glu", "layer_scale": 1e-4, "width": 20, "mlp_ratio": 2.0},
]

every_mixer = pytest.mark.parametrize("mixer", sorted(MIXERS))


def make(mixers: str = "window(window=7)", **options):
    return timm.create_model("tessel_lab_atto", mixers=mixers, num_classes=10, **{"depth": (1, 1, 1, 1), **options})


def gradients(model, x):
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name, millions", [("atto", 0.42), ("tiny", 28.3), ("small", 49.6), ("base", 87.7)])
def test_sizes_are_those_of_swin(name, millions):
    model = timm.create_model(f"tessel_lab_{name}", device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert lab.describe(model) == "window(window=7) | window(window=7) | window(window=7) | window(window=7)"


@every_mixer
def test_every_mixer_in_every_stage_takes_any_image(mixer):
    model = make(mixer).eval()
    assert lab.describe(model) == " | ".join([mixer] * 4)
    assert all(type(stage.blocks[0].mixer.fn) is MIXERS[mixer].kind for stage in model.stages)
    with torch.inference_mode():
        for size in ((1, 1), (7, 13), (64, 41)):
            maps = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
            for found, info in zip(maps, model.feature_info, strict=True):
                assert found.shape[2:] == tuple(math.ceil(side / info["reduction"]) for side in size)
            assert model(torch.randn(1, 3, *size)).isfinite().all()


@every_mixer
def test_every_mixer_trains_with_and_without_checkpointing(mixer):
    model = make(mixer).double().train()
    x, state = torch.randn(2, 3, 64, 40).double(), copy.deepcopy(model.state_dict())
    plain = gradients(model, x)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in plain.values())
    model.load_state_dict(state)
    model.set_grad_checkpointing()
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-12, msg=name)


@every_mixer
def test_every_mixer_has_features_layer_groups_and_initial_weights(mixer):
    model = make(mixer)
    groups = param_groups_layer_decay(model, layer_decay=0.8)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert all(named[name].dim() > 1 for name in model.no_weight_decay())
    assert bool(model.no_weight_decay()) == bool(MIXERS[mixer].no_weight_decay)
    features = timm.create_model("tessel_lab_atto", mixers=mixer, features_only=True, out_indices=(1, 3))
    assert [m.shape[1] for m in features(torch.randn(2, 3, 64, 32))] == [24, 96]
    empty = make(mixer, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*empty.parameters(), *empty.buffers()]:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    empty.init_weights()
    assert all(parameter.isfinite().all() for parameter in empty.parameters())
    for name, parameter in [(name, p) for name, p in empty.named_parameters() if p.numel() > 200]:
        spread = named[name].std(unbiased=False).item()
        assert parameter.std(unbiased=False).item() == pytest.approx(spread, rel=0.5, abs=1e-2), name


def test_a_mixer_initializes_its_layers_in_its_own_way():
    halo, window = (make(mixer, width=32).stages[3].blocks[0].mixer.fn for mixer in ("halo", "window"))
    assert halo.q.weight.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert window.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.slow
@every_mixer
def test_every_mixer_compiles_and_exports(mixer):
    model, x = make(mixer).eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_options_of_the_structure(options):
    model = make("window | hilo(alpha=0.9) | bi_level_routing | halo(block_size=4)", **options)
    model.init_weights()
    assert all(gradient is not None for gradient in gradients(model.train(), torch.randn(2, 3, 40, 52)).values())
    if "heads" in options:
        assert [stage.blocks[0].mixer.fn.num_heads for stage in make("window", **options).stages] == [1, 2, 3, 4]


def test_a_specification_round_trips_and_its_mixers_alternate():
    model = timm.create_model("tessel_lab_tiny", mixers=EXAMPLE, device="meta")
    assert lab.describe(model) == EXAMPLE
    kinds = [type(block.mixer.fn).__name__ for block in model.stages[2].blocks]
    assert kinds == ["BiLevelRouting", "Channel"] * 3
    assert model.stages[2].blocks[0].mixer.fn.topk == 4 and model.stages[1].blocks[0].mixer.fn.low_heads == 5
    again = timm.create_model("tessel_lab_tiny", mixers=lab.describe(model), device="meta")
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


CALLS = st.sampled_from(
    ["hilo", "hilo(window=1)", "window(window=(3, 5))", "channel", "cross_shaped_window(stripe_width=None)"]
)


@given(st.lists(st.lists(CALLS, min_size=1, max_size=3), min_size=4, max_size=4))
def test_any_text_is_read_back(stages):
    text = " | ".join(", ".join(stage) for stage in stages)
    parsed = parse_mixers(f" {text} ".replace("(", " (").replace("=", " = "), 4)
    assert " | ".join(", ".join(map(str, stage)) for stage in parsed) == text


def test_arguments_may_be_shortened_and_default_to_those_of_the_paper():
    ((spec,),) = parse_mixers("halo(block=4, halo=1)", 1)
    assert str(spec) == "halo(block_size=4, halo_size=1)"
    routing = MIXERS["bi_level_routing"]
    assert [routing.make(Place(64, stride)).topk for stride in (4, 8, 16, 32)] == [1, 4, 16, 49]
    stripes = MIXERS["cross_shaped_window"]
    assert [stripes.make(Place(96, stride)).stripe_width for stride in (4, 8, 16, 32)] == [1, 2, 7, None]
    assert stripes.make(Place(96)).num_heads == 2 and stripes.make(Place(64, num_heads=8)).num_heads == 8


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mixers": "helo"}, "no mixer is named 'helo' (did you mean 'hilo'?); there are adaptive_"),
        ({"mixers": "hilo(alpa=1)"}, "hilo has no argument 'alpa' (did you mean 'alpha'?); it takes num_heads, window"),
        ({"mixers": "hilo(alpha='x')"}, "hilo: alpha='x' must be a literal of type float"),
        ({"mixers": "window(window=True)"}, "window: window=True must be a literal of type int | tuple[int, int]"),
        ({"mixers": "hilo(window=n)"}, "hilo: window=n must be a literal of type int"),
        ({"mixers": "hilo(0.9)"}, "'hilo(0.9)' is not a mixer; write name or name(argument=value)"),
        ({"mixers": "hilo(window=1, win=2)"}, "hilo: argument 'window' is given twice"),
        ({"mixers": "halo(stride=2)"}, "halo has no argument 'stride'; it takes"),
        ({"mixers": "hilo("}, "mixers 'hilo('"),
        ({"mixers": "hilo | | halo | hilo"}, "mixers '' names no mixer"),
        ({"mixers": "hilo | halo"}, "has 2 stages separated by '|'; give 4, or one for all"),
        ({"mixers": "hilo, halo"}, "stages.0 has 1 blocks for 2 mixers; raise depth=(1, 1, 1, 1) or name fewer"),
        ({"mixers": "window(num_heads=5)"}, "stages.0: Window: dim=12 must be divisible by num_heads=5"),
        ({"stem": "patches"}, "stem='patches' is unknown (did you mean 'patch'?); use one of patch, convolutional"),
        ({"norm": "group"}, "norm='group' is unknown; use one of layer, batch"),
        ({"channel_mixer": "glu"}, "channel_mixer='glu' is unknown"),
        ({"position": "sine"}, "position='sine' is unknown"),
        ({"depth": (1, 1)}, "the four numbers depth=(1, 1)"),
        ({"heads": (1, 1)}, "heads=(1, 1) must be four numbers"),
    ],
)
def test_wrong_arguments_are_named_with_the_nearest(options, words):
    with pytest.raises(ValueError) as caught:
        make(**options)
    assert words in str(caught.value)


def test_describe_refuses_other_models():
    with pytest.raises(ValueError, match="CSWin is not a model of the lab"):
        lab.describe(timm.create_model("cswin_atto"))
