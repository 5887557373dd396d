"""The behavior that users of timm and PyTorch expect of a model, tested on the smallest model of every family."""

import copy
import dataclasses
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import NormMlpClassifierHead
from timm.models._features import FeatureGetterNet
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

import tessel.zoo
from tessel.checkpoints import load_manifest
from tessel.zoo._backbone import Backbone, Stage, feature_map
from tessel.zoo._family import configuration
from tessel.zoo._pretrained import classifier_keys


def make(name: str, **kwargs) -> Backbone:
    model = timm.create_model(name, **kwargs)
    assert isinstance(model, Backbone)
    return model


def small(name: str, **kwargs) -> nn.Module:
    """The model with ten classes, so that its head is small."""
    return timm.create_model(name, num_classes=10, **kwargs)


def images(*sizes: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *sizes)


def as_map(features: Tensor, like: Tensor) -> Tensor:
    """The map in the result of `forward_features`, which in models with a class token are tokens, that token first."""
    return features if features.dim() == 4 else features[:, 1:].transpose(1, 2).unflatten(2, like.shape[2:])


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_no_model_name_is_one_of_timms():
    listing = subprocess.run(
        [sys.executable, "-c", "import json, timm; print(json.dumps(timm.list_models()))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not set(tessel.zoo.list_models()) & set(json.loads(listing.stdout))


def test_every_family_has_an_atto_variant():
    for family in tessel.zoo.list_families():
        assert sum(name.endswith("_atto") for name in family.variants) == 1, family.variants


@pytest.mark.parametrize("family", tessel.zoo.list_families(), ids=lambda family: family.model.__name__)
def test_entry_points_are_attributes_of_their_module(family):
    module = sys.modules[family.build.__module__]
    star: dict[str, object] = {}
    exec(f"from {module.__name__} import *", star)
    lines = Path(str(module.__file__)).read_text().splitlines()
    for name, cfg in family.variants.items():
        entry_point = getattr(module, name)
        assert star[name] is entry_point is timm.models.model_entrypoint(name)
        assert (entry_point.__name__, entry_point.__qualname__, entry_point.__module__) == (name, name, module.__name__)
        assert pickle.loads(pickle.dumps(entry_point)) is entry_point
        assert list(inspect.signature(entry_point).parameters) == ["pretrained", "kwargs"]
        assert inspect.getsourcefile(inspect.unwrap(entry_point)) == module.__file__
        doc = inspect.getdoc(entry_point) or ""
        assert all(f"{field} = {value!r}" in doc for field, value in vars(cfg).items())
        size = " x ".join(map(str, timm.get_pretrained_cfg(name).input_size))
        tags = [weight.tag for weight in load_manifest().values() if weight.model == name]
        assert f"Input size: {size}" in doc and all(tag in doc for tag in tags)
        source, number = doc.splitlines()[-1].removeprefix("Source: ").rstrip(".").split(":")
        assert source == module.__name__.replace(".", "/") + ".py"
        assert lines[int(number) - 1].strip().startswith(f'"{name}": ')


def test_family_classes_add_nothing_to_backbone():
    classes = [family.model for family in tessel.zoo.list_families()]
    assert len(set(classes)) == len(classes)
    for cls in classes:
        assert cls.__bases__ == (Backbone,)
        assert {name for name in vars(cls) if name not in ("__firstlineno__", "__static_attributes__")} == {
            "__doc__",
            "__module__",
        }
        assert cls.__doc__ and cls.__module__ == f"tessel.zoo.{Path(inspect.getfile(cls)).stem}"


def test_models_are_instances_of_their_family_class(model_name):
    model = small(model_name).eval()
    cls = next(family.model for family in tessel.zoo.list_families() if model_name in family.variants)
    assert type(model) is cls and repr(model).startswith(f"{cls.__name__}(")
    assert type(timm.create_model(model_name, features_only=True).model) is cls
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(copy.deepcopy(model)) is cls
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 13), (33, 65), (40, 52), (64, 64)], ids=str)
def test_images_of_any_size(model_name, size):
    model = small(model_name).eval()
    with torch.inference_mode():
        assert model(images(*size)).isfinite().all()
        intermediates = model.forward_intermediates(images(*size), intermediates_only=True)
    for intermediate, info in zip(intermediates, model.feature_info, strict=True):
        assert intermediate.shape[1] == info["num_chs"]
        for got, side in zip(intermediate.shape[2:], size, strict=True):
            assert side // info["reduction"] <= got <= -(-side // info["reduction"]) + 1, (intermediate.shape, info)


def test_images_of_a_batch_do_not_affect_each_other(model_name):
    model = small(model_name).double().eval()
    x = images(64, 48).double()
    with torch.inference_mode():
        torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-9, atol=1e-9)


def test_memory_format_does_not_change_the_output(model_name):
    model = small(model_name).double().eval()
    x = images(64, 48).double()
    with torch.inference_mode():
        y = model(x)
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), y, rtol=1e-9, atol=1e-9)
        sliced = torch.cat([x, x], dim=3)[..., : x.shape[3]]
        torch.testing.assert_close(model(sliced), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_constructor_arguments(model_name, pool):
    if pool == "catavgmax" and isinstance(make(model_name).head, NormMlpClassifierHead):
        with pytest.raises(AssertionError, match="width"):
            make(model_name, global_pool=pool)
        return
    classes = 7 if pool else 0
    model = make(
        model_name, num_classes=classes, in_chans=1, global_pool=pool, drop_rate=0.1, drop_path_rate=0.1
    ).eval()
    x = torch.randn(2, 1, 64, 64)
    y = model(x)
    assert y.shape == (2, 7) if pool else y.shape == model.forward_features(x).shape
    assert model.num_classes == classes and model.in_chans == 1 and model.drop_rate == 0.1
    assert model.num_features == model.feature_info[-1]["num_chs"]
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape[2 if pooled.dim() == 3 else 1] == model.head_hidden_size


def test_unknown_arguments_are_named(model_name):
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(model_name, no_such_argument=1)
    with pytest.raises(TypeError, match=r"'drop_path_rates' \(did you mean 'drop_path_rate'\?\); .* drop_path_rate, "):
        timm.create_model(model_name, drop_path_rates=1)
    for argument in ("norm_layer", "act_layer", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"):
        with pytest.raises(TypeError, match=f"unknown argument '{argument}'"):
            timm.create_model(model_name, **{argument: 0.1})
    if "img_size" not in {field.name for field in dataclasses.fields(configuration(model_name, {})[1])}:
        with pytest.raises(TypeError, match="'img_size'; the model takes images of any size without it"):
            timm.create_model(model_name, img_size=64)


def test_torchscript_is_refused(model_name):
    with pytest.raises(NotImplementedError, match=f"{model_name} cannot be compiled by TorchScript.*torch.export"):
        timm.create_model(model_name, scriptable=True)


def test_unsupported_pooling_is_refused(model_name):
    with pytest.raises(AssertionError):
        timm.create_model(model_name, global_pool="median")


def test_impossible_drop_path_rate_is_an_error(model_name):
    for rate in (-1, 5):
        with pytest.raises(ValueError, match=f"drop_path_rate={rate} must lie in 0..1"):
            timm.create_model(model_name, drop_path_rate=rate)


def test_drop_path_reaches_the_blocks(model_name):
    model = small(model_name, drop_path_rate=0.5).train()
    x = images(64, 64)
    model.eval()
    still = model(x)
    torch.testing.assert_close(model(x), still)
    rates = [m.drop_prob for m in model.modules() if m.__class__.__name__ == "DropPath"]
    assert rates and max(rates) == pytest.approx(0.5) and rates == sorted(rates)


def test_reset_classifier_replaces_or_removes_it(model_name):
    model = make(model_name, num_classes=10).eval()
    x = images(64, 64)
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and model.num_classes == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    unpooled, features = model(x), model.forward_features(x)
    assert unpooled.ndim == features.ndim and model.head_hidden_size in unpooled.shape
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    model.double().reset_classifier(4)
    assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize("pool", [None, "max"])
def test_reset_classifier_keeps_all_other_weights(model_name, pool):
    model = make(model_name, num_classes=10)
    new = classifier_keys(model.default_cfg)
    kept = {key: t.clone() for key, t in model.state_dict().items() if key not in new}
    old = {name: p.std().item() for name, p in model.named_parameters() if name in new and p.dim() > 1}
    model.reset_classifier(200, pool)
    state = model.state_dict()
    assert state.keys() - kept.keys() == new
    assert all(torch.equal(state[key], tensor) for key, tensor in kept.items())
    # the new classifier has the initialization of the old one
    for name, std in old.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.2) and len(state[name]) == 200
        assert not state[name.replace("weight", "bias")].any()


def test_forward_intermediates(model_name):
    model = make(model_name, num_classes=10).eval()
    x = images(96, 64)
    with torch.inference_mode():
        features = model.forward_features(x)
        final, intermediates = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
        assert len(intermediates) == len(model.feature_info)
        last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(last[0], as_map(features, last[0]))
        picked = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True)
        torch.testing.assert_close(picked[0], intermediates[0])
        torch.testing.assert_close(picked[1], intermediates[-2])
        early, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
        torch.testing.assert_close(as_map(early, first), first)
    with pytest.raises(AssertionError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(AssertionError):
        model.forward_intermediates(x, indices=[9])


@pytest.mark.parametrize("feature_cls", ["getter", "list", "fx"])
def test_features_only(model_name, feature_cls):
    whole = small(model_name).eval()
    model = timm.create_model(model_name, features_only=True, out_indices=(1, 3), feature_cls=feature_cls).eval()
    # timm's other extractors return what a stage returns, which may be a map and a class token
    maps = [feature_map(m) for m in model(images(64, 96))]
    info = [whole.feature_info[i] for i in (1, 3)]
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [i["num_chs"] for i in info]
    assert model.feature_info.reduction() == [i["reduction"] for i in info]
    if feature_cls == "getter":
        assert isinstance(model, FeatureGetterNet)


def test_features_only_leaves_no_unused_parameter(model_name):
    model = timm.create_model(model_name, features_only=True, out_indices=(0, 2)).train()
    sum(m.square().mean() for m in model(images(64, 64))).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_prune_intermediate_layers_keeps_the_feature_map(model_name, level):
    model = make(model_name, num_classes=10).eval()
    x = images(64, 64)
    with torch.inference_mode():
        (expected,) = model.forward_intermediates(x, indices=[level], intermediates_only=True)
        assert model.prune_intermediate_layers([level], prune_norm=True) == [level]
        torch.testing.assert_close(as_map(model.forward_features(x), expected), expected)
    assert model.num_features == model.head_hidden_size == expected.shape[1]
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)


def test_every_parameter_gets_a_gradient(model_name):
    model = small(model_name).train()
    grads = gradients(model, images(128, 128))
    assert [name for name, g in grads.items() if g is None] == []
    assert all(g.isfinite().all() for g in grads.values() if g is not None)


def test_gradient_checkpointing_does_not_change_gradients(model_name):
    model = make(model_name, num_classes=10).double().train()
    x = images(64, 64).double()
    state = copy.deepcopy(model.state_dict())
    plain = gradients(model, x)
    model.load_state_dict(state)
    model.set_grad_checkpointing()
    assert sum(stage.grad_checkpointing for stage in model.stages) == len(model.stages) and model.grad_checkpointing
    for name, grad in gradients(model, x).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-9, atol=1e-12, msg=name)
    model.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in model.stages) and not model.grad_checkpointing


def test_gradient_checkpointing_is_not_nested(model_name, monkeypatch):
    depth, deepest = 0, 0
    original = torch.utils.checkpoint.checkpoint

    def counting(function, *args, **kwargs):
        def run(*inputs):
            nonlocal depth, deepest
            depth += 1
            deepest = max(deepest, depth)
            try:
                return function(*inputs)
            finally:
                depth -= 1

        return original(run, *args, **kwargs)

    monkeypatch.setattr("timm.models._manipulate.torch.utils.checkpoint.checkpoint", counting)
    model = make(model_name, num_classes=10).train()
    model.set_grad_checkpointing()
    model(images(64, 64)).sum().backward()
    assert deepest == 1


def test_bfloat16_autocast(model_name):
    model = small(model_name).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images(64, 64))
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_weights(model_name):
    model = small(model_name, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    y = model(images(64, 64).bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_init_weights_sets_every_parameter_and_buffer(model_name):
    model = make(model_name, num_classes=10, device="meta")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
    torch.manual_seed(0)
    model.init_weights()
    assert all(t.isfinite().all() for t in [*model.parameters(), *model.buffers()])
    # the constructor initializes in the same way: equal constants, and random values of the same standard deviation
    fresh = dict(small(model_name).named_parameters())
    for name, p in model.named_parameters():
        rel = max(0.5, 4 * p.numel() ** -0.5)  # the deviation of a few random values is uncertain
        assert p.std(unbiased=False).item() == pytest.approx(fresh[name].std(unbiased=False).item(), rel=rel, abs=1e-2)
    fresh_buffers = dict(small(model_name).named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, fresh_buffers[name])
    assert model.eval()(images(64, 64)).isfinite().all()


def test_deep_copies_are_independent(model_name):
    model = small(model_name).eval()
    x = images(64, 64)
    with torch.inference_mode():
        model(x)
    duplicate = copy.deepcopy(model)
    torch.testing.assert_close(duplicate(x), model(x))
    with torch.no_grad():
        next(duplicate.parameters()).add_(1.0)
    assert not torch.equal(next(duplicate.parameters()), next(model.parameters()))
    # tables cached in inference mode must not break a later training step
    model.train()(x).sum().backward()


def test_state_dict_round_trip(model_name, tmp_path):
    model = small(model_name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = small(model_name, checkpoint_path=str(tmp_path / "model.pt")).eval()
    x = images(64, 64)
    torch.testing.assert_close(again(x), model(x))


def test_layer_groups_cover_every_parameter_once(model_name):
    model = make(model_name)
    names = [name for name, _ in model.named_parameters()]
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        listed = [name for group in groups.values() for name in group]
        assert sorted(listed) == sorted(names) and len(groups) > 3
    stem, head = min(groups), max(groups)
    assert all(n.startswith("stem") for n in groups[stem]) and any(n.startswith("head") for n in groups[head])
    for decayed in (param_groups_layer_decay(model, layer_decay=0.8), param_groups_weight_decay(model)):
        parameters = [id(p) for group in decayed for p in group["params"]]
        assert len(parameters) == len(set(parameters)) == len(names)


def test_no_weight_decay_lists_existing_parameters(model_name):
    model = make(model_name)
    named = dict(model.named_parameters())
    assert all(named[name].dim() > 1 for name in model.no_weight_decay())


@pytest.mark.slow
def test_compiles_as_one_graph(model_name):
    model = small(model_name).train()
    x = images(64, 64)
    expected = gradients(model, x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    compiled(x).square().mean().backward()
    for name, p in compiled._orig_mod.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    torch._dynamo.reset()


def test_torch_export(model_name):
    model = small(model_name).eval()
    x = images(64, 64)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any("tessel" in str(node.target) for node in program.graph.nodes), "the graph must not need tessel"


@pytest.mark.filterwarnings("ignore")  # torch warns about tracing
def test_torch_jit_trace(model_name):
    model = small(model_name).eval()
    x = images(64, 64)
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x), rtol=1e-4, atol=1e-5)


def test_stages_are_instances_of_stage(model_name):
    model = make(model_name)
    assert all(isinstance(stage, Stage) for stage in model.stages)


def test_default_cfg_names_layers_that_exist(model_name):
    model = make(model_name)
    cfg = model.default_cfg
    for path in (cfg["first_conv"], cfg["classifier"]):
        for name in [path] if isinstance(path, str) else path:
            assert hasattr(model.get_submodule(name), "weight")
    with torch.device("meta"):
        *_, features = make(model_name).forward_intermediates(
            torch.empty(1, *cfg["input_size"]), intermediates_only=True
        )
    assert tuple(features.shape[2:]) == tuple(cfg["pool_size"])
