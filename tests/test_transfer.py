"""Transfer between models (initial weights, probes, distillation), and other recipe keys of published recipes."""

from contextlib import nullcontext

import pytest
import timm
import torch
import trainer
from torch.nn import functional as F

import tessel.zoo
from tessel.train import engine, evaluate
from tessel.train.data.sampler import GlobalBatchSampler, RepeatedAugSampler
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.optim.optimizer import build_optimizer
from tessel.train.optim.schedule import build_schedule
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.plan import plan
from tessel.train.recipe.schema import Optim
from tessel.train.tasks.classify.distillation import Teacher
from tessel.train.tasks.classify.options import Distill
from tessel.train.tasks.classify.probe import freeze_for_probe
from tessel.train.tasks.export import export_classifier
from tessel.train.trainer import build

MODEL = "biformer_atto"  # it has batch norm and drop path, which a frozen model must not use
FIXED = {  # models with a fixed input size, and the names of their classifiers
    "vit_tiny_patch16_224": ("{depth: 1, embed_dim: 24}", {"head"}),
    "deit_tiny_distilled_patch16_224": ("{depth: 1, embed_dim: 24}", {"head", "head_dist"}),
    "swin_tiny_patch4_window7_224": (
        "{depths: [1, 1], num_heads: [1, 2], embed_dim: 16, window_size: 4}",
        {"head.fc"},
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trainer.draw_folder(tmp_path_factory.mktemp("images"), train=6, val=2)


@pytest.fixture
def recipe(tmp_path, images):
    return write(tmp_path / "tiny.yaml", images)


def write(path, images):
    sections = {
        "model": {"name": MODEL, "drop_path_rate": None},
        "optim": {"layer_decay": None},
        "ema": {"decay": None},
    }
    return trainer.write_recipe(
        path, data={"root": str(images)}, sched={"steps": 3, "warmup": 0}, ckpt={"every": 1}, **sections
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory, images):
    """A finished run of three steps, whose export initializes other models."""
    path = write(tmp_path_factory.mktemp("base") / "base.yaml", images)
    assert trainer.train(path, "run.name=base") == 0
    return path.parent / "runs/base"


def exported(run):
    return timm.create_model(f"local-dir:{run}/export", pretrained=True).eval()


def built(recipe, *overrides):
    return build(load_recipe(recipe, overrides), World())


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_probe_trains_only_its_classifier(recipe, base, kind):
    run = recipe.parent / "runs/tiny"
    source = f"model.init_from=local-dir:{base}/export"
    assert trainer.train(recipe, f"task.probe={kind}", source, "model.kwargs={drop_path_rate: 0.5}") == 0
    model, before = exported(run), exported(base).state_dict()
    frozen = (model if kind == "linear" else model.backbone).state_dict()
    classifier = {"head.fc.weight", "head.fc.bias"}
    assert frozen.keys() >= before.keys() - classifier
    for key in before.keys() - classifier:  # includes the running statistics and their counters
        assert torch.equal(frozen[key], before[key]), key
    start = built(recipe, f"task.probe={kind}", source)[2].model.state_dict()
    trained = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start[key])}
    if kind == "linear":
        assert trained == classifier
    else:
        assert trained and all(key.split(".")[0] in ("pool", "fc") for key in trained)
        assert {"fc.weight", "pool.latent", "pool.kv.weight", "pool.mlp.fc1.weight"} <= trained
    for target in (run, run / "checkpoints/step-00000003"):
        assert evaluate.main([str(target)]) == 0


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_models_of_a_fixed_input_size_can_be_probed(recipe, name, kind):
    """These models return tokens or channels-last maps, and one has two classifiers."""
    kwargs, heads = FIXED[name]
    overrides = [f"model.name={name}", f"model.kwargs={kwargs}", f"task.probe={kind}"]
    assert trainer.train(recipe, *overrides) == 0
    run = recipe.parent / "runs/tiny"
    model, start = exported(run), built(recipe, *overrides)[2].model.state_dict()
    trained = {key.rpartition(".")[0] for key, new in model.state_dict().items() if not torch.equal(new, start[key])}
    assert trained == heads if kind == "linear" else {key.split(".")[0] for key in trained} == {"pool", "fc"}
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert evaluate.main([str(run)]) == 0


@pytest.mark.parametrize(
    "key",
    [
        "task.probe=linear",
        pytest.param("task.probe=attentive", marks=pytest.mark.slow),
        "task.probe=ep",
        "task.distill.teacher=local-dir:{}/export",
    ],
)
def test_resume_of_a_probe_or_distillation_is_exact(recipe, base, monkeypatch, capsys, key):
    overrides = [key.format(base), f"model.init_from=local-dir:{base}/export"]
    step = engine.Engine.step

    def interrupted(self):
        if self.progress.step == 2:
            raise RuntimeError("power cut")
        return step(self)

    assert trainer.train(recipe, *overrides, "run.name=straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "step", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.train(recipe, *overrides)
    assert trainer.train(recipe, *overrides) == 0
    assert "at step 2 (exact)" in capsys.readouterr().out
    runs = recipe.parent / "runs"
    trainer.assert_same_checkpoint(*(runs / name / "checkpoints/step-00000003" for name in ("straight", "tiny")))


def test_attentive_probe_pools_tokens_by_attention(base):
    model = freeze_for_probe(exported(base), "attentive").eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = model.backbone.forward_features(x).flatten(2).transpose(1, 2)
    assert tokens.shape == (2, 4, 128) and model(x).shape == (2, 3)
    torch.testing.assert_close(model(x), model.fc(model.pool(tokens)))
    shuffled = model.fc(model.pool(tokens[:, torch.randperm(4)]))
    torch.testing.assert_close(model(x), shuffled, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(x), model.fc(tokens.mean(1)))


def test_init_from_copies_the_weights_of_an_export(recipe, base):
    start = built(recipe, f"model.init_from=local-dir:{base}/export")[2].model.state_dict()
    for key, tensor in exported(base).state_dict().items():
        assert torch.equal(start[key], tensor), key


def teacher(base, student=(0.5, 0.25), **keys):
    config = {"mean": (student[0],) * 3, "std": (student[1],) * 3, "input_size": (3, 32, 32)}
    distill = Distill(teacher=f"local-dir:{base}/export", **keys)
    classes = ["class_0", "class_1", "class_2"]
    return Teacher(distill, classes=classes, size=32, config=config, device=torch.device("cpu"))


def test_teacher_gets_images_with_its_own_normalization(base):
    model, image = exported(base), torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = model((image - mean) / std)
        loss = teacher(base).loss((image - 0.5) / 0.25, logits)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_distillation_losses_equal_their_formulas(base):
    model, logits = exported(base), torch.randn(4, 3, requires_grad=True)
    images = torch.randn(4, 3, 32, 32)
    same = (model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0])
    own = {"mean": model.pretrained_cfg["mean"], "std": model.pretrained_cfg["std"]}
    assert same
    targets = model(images).detach()
    for kind, t in (("soft", 1.0), ("soft", 3.0), ("hard", 1.0)):
        imitated = teacher(base, kind=kind, temperature=t)
        imitated.mean, imitated.std = (torch.tensor(own[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        p, q = (targets / t).softmax(1), (logits / t).log_softmax(1)
        wanted = t * t * (p * (p.log() - q)).sum(1).mean()
        if kind == "hard":
            wanted = F.cross_entropy(logits, targets.argmax(1))
        loss = imitated.loss(images, logits)
        torch.testing.assert_close(loss, wanted)
        loss.backward()
    assert not any(p.requires_grad for p in imitated.model.parameters()) and not imitated.model.training


def test_distill_weight_splits_the_loss_between_labels_and_teacher(recipe, base):
    mixed = ["task.distill.weight=0.25", "data.aug.mixup=0", "data.aug.cutmix=0", "data.aug.erasing=0"]
    task, schedule, made = built(recipe, f"task.distill.teacher=local-dir:{base}/export", *mixed)
    batch = next(task.train_batches(schedule, 0))
    made.model.eval()
    parts = task.loss(made.model, batch)
    images = task.normalize(batch[0])
    logits = made.model(images)
    torch.testing.assert_close(parts["label_loss"], 0.75 * F.cross_entropy(logits, batch[1]))
    torch.testing.assert_close(parts["distill_loss"], 0.25 * task.teacher.loss(images, logits))


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["task.distill.teacher=test_vit_"], ["task.distill.teacher='test_vit_'", "test_vit"]),
        (["model.init_from=biformer_atom"], ["model.init_from='biformer_atom'", "biformer_atto"]),
        (["model.init_from=local-dir:/nowhere"], ["model.init_from=local-dir:/nowhere"]),
        (["model.init_from=local-dir:BASE/export", "model.name=test_resnet"], ["does not fit", "same parameters"]),
        (["model.init_from=biformer_atto", "model.pretrained=true"], ["model.pretrained has no effect"]),
        (["task.probe=linear", "sched.freeze=1"], ["sched.freeze has no effect"]),
        (["task.probe=linear", "model.drop_path_rate=0.5"], ["model.drop_path_rate has no effect"]),
        (["task.probe=mean"], ["task.probe='mean'", "linear"]),
        (["task.distill.kind=hard"], ["without task.distill.teacher"]),
        (["task.distill.teacher=test_vit", "task.distill.kind=hard", "task.distill.temperature=2"], ["temperature"]),
        (["sched.cooldown=1", "sched.name=constant"], ["sched.cooldown has no effect"]),
        (["sched.cooldown=3"], ["sched.cooldown=3", "shorter"]),
        (["optim.lr_factors={nowhere: 0.1}"], ["optim.lr_factors", "'nowhere'"]),
        (["optim.lr_factors={'(': 0.1}"], ["optim.lr_factors", "regular expression"]),
        (["optim.lr_factors={head: 0}"], ["optim.lr_factors.head"]),
    ],
)
def test_errors_name_the_key(recipe, base, overrides, fragments, capsys):
    assert trainer.train(recipe, *(text.replace("BASE", str(base)) for text in overrides)) == 1
    message = capsys.readouterr().err
    assert all(fragment in message for fragment in fragments) and message.count("\n") == 1, message
    assert not (recipe.parent / "runs/tiny").exists()


def test_teacher_with_other_classes_is_an_error(base):
    distill = Distill(teacher=f"local-dir:{base}/export")
    for classes in (["a", "b", "c"], ["class_0", "class_1"]):
        with pytest.raises(UserError, match="the same classes in the same order"):
            Teacher(distill, classes=classes, size=32, config={"mean": [0] * 3, "std": [1] * 3}, device="cpu")


def test_teacher_of_another_input_size_is_an_error(tmp_path):
    """An exported model accepts only the image size that it was trained with."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_classes=2, img_size=32)
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32), "crop_pct": 1.0}
    export_classifier(model, tmp_path / "export", classes=["a", "b"], data_config=config)
    distill = Distill(teacher=f"local-dir:{tmp_path}/export")
    for size, outcome in ((32, nullcontext()), (48, pytest.raises(UserError, match="distill.teacher=.*3 x 48 x 48"))):
        with outcome:
            Teacher(distill, classes=["a", "b"], size=size, config=config, device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.pth", b"junk"),
        ("empty.pth", b""),
        ("zeros.pth", bytes(500)),
        ("number.pth", b"\x80\x02K\x01."),
        ("list.pth", [1, 2]),
        ("nested.pth", {"state_dict": 3}),
        ("text.safetensors", b"junk"),
        ("empty.safetensors", b""),
        ("zeros.npz", bytes(500)),
    ],
)
def test_files_without_weights_are_errors(recipe, tmp_path, capsys, name, content):
    file = tmp_path / name
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    kwargs = f"model.kwargs={{pretrained_cfg_overlay: {{file: {file}}}}}"
    assert trainer.train(recipe, "model.name=test_resnet", "model.pretrained=true", kwargs) == 1
    message = capsys.readouterr().err
    assert str(file) in message and message.startswith("error: ") and message.count("\n") == 1, message


@pytest.mark.parametrize("config", ["{}", '{"task": "segment", "model": {}}', "[]", "{"])
def test_folders_without_an_exported_classifier_are_errors(recipe, tmp_path, capsys, config):
    (tmp_path / "config.json").write_text(config)
    assert trainer.train(recipe, f"model.init_from=local-dir:{tmp_path}") == 1
    message = capsys.readouterr().err
    assert f"model.init_from=local-dir:{tmp_path}" in message and "export/ of a classifier" in message
    assert message.count("\n") == 1, message


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_order_of_repeated_augmentation(repeats):
    def stream(rank, world_size):
        sizes = {"micro_batch": 3, "accumulate": 4 // world_size, "rank": rank, "world_size": world_size}
        return list(RepeatedAugSampler(repeats=repeats, length=17, seed=5, start=0, stop=120, **sizes))

    whole = [key for chunk in stream(0, 1) for key in chunk]
    parts = [stream(rank, 2) for rank in range(2)]
    for step in range(10):
        both = [key for rank in parts for chunk in rank[2 * step : 2 * step + 2] for key in chunk]
        assert both == whole[12 * step : 12 * step + 12]
    assert len(set(whole)) == len(whole)  # each copy of an image has its own seed
    for epoch in range(7):
        seen = [index for number, index in whole if number // repeats == epoch]
        assert len(seen) == 17 and len(set(seen)) == -(-17 // repeats)
    first = [index for _, index in whole[:12]]
    assert all(first.count(index) == repeats for index in first)
    if repeats == 1:
        plain = GlobalBatchSampler(
            length=17, seed=5, start=0, stop=120, micro_batch=3, accumulate=4, rank=0, world_size=1
        )
        assert whole == [key for chunk in plain for key in chunk]
    else:  # the copies of an image are far apart, on different processes if there are enough
        places = [place for place, index in enumerate(first) if index == first[0]]
        assert min(b - a for a, b in zip(places, places[1:], strict=False)) >= 12 // repeats


def test_lr_factors_and_decay_of_norms():
    model = timm.create_model("litv2_atto")
    optim = Optim(lr_factors={r"offset\.weight$": 0.01, r"^stages\.1": 0.5}, weight_decay=0.1, layer_decay=0.5)
    optimizer = build_optimizer(model, optim, 1.0)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        wanted = 0.01 if name.endswith("offset.weight") else 0.5 if name.startswith("stages.1") else 1.0
        assert groups[parameter]["lr"] == wanted, name
        assert 0 < groups[parameter]["lr_scale"] <= 1
    for factors in ({}, {"head": 0.1}):
        alike = build_optimizer(model, Optim(decay_norms=True, weight_decay=0.1, lr_factors=factors), 1.0)
        assert {group["weight_decay"] for group in alike.param_groups} == {0.1}


def test_lr_factors_do_not_go_below_the_minimum_lr():
    """LITv2 scales the rate of its offsets by 0.01. That is the minimum rate, so it is constant after the warm-up."""
    recipe = load_recipe("imagenet/litv2_small")
    planned = plan(recipe, samples=1_281_167, world_size=8)
    optimizer = build_optimizer(timm.create_model("litv2_atto"), recipe.optim, planned.lr)
    schedule = build_schedule(optimizer, recipe, planned)
    rates = []
    for step in (planned.warmup, planned.steps // 2, planned.steps - 1):
        schedule.step_update(step)
        rates.append(sorted({group["lr"] for group in optimizer.param_groups}))
    assert [rate[0] for rate in rates] == pytest.approx([1e-5] * 3) and rates[1][1] > 4e-4


def test_cooldown_is_part_of_the_training_length(recipe):
    loaded = load_recipe(recipe, ["sched.steps=20", "sched.cooldown=5", "sched.min_lr=1e-5"])
    planned = plan(loaded, samples=18, world_size=1)
    assert (planned.steps, planned.cooldown) == (20, 5)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), Optim(name="sgd"), planned.lr)
    schedule = build_schedule(optimizer, loaded, planned)
    rates = []
    for step in range(20):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[15:] == [1e-5] * 5 and rates[14] > 1e-5 and rates[0] == pytest.approx(2e-3)


def test_the_probe_is_not_listed_in_the_zoo():
    assert "attentive_probe" not in tessel.zoo.list_models() and timm.is_model("attentive_probe")


@pytest.mark.parametrize("classes", [10, 7])
def test_weights_that_share_no_name_with_the_model_are_an_error(recipe, tmp_path, capsys, classes):
    """With another number of classes, timm loads what fits, which is nothing."""
    state = timm.create_model("test_vit", num_classes=classes).state_dict()
    torch.save({f"other.{name}": tensor for name, tensor in state.items()}, tmp_path / "other.pth")
    assert trainer.train(recipe, f"model.init_from={tmp_path}/other.pth", "model.name=test_resnet") == 1
    error = capsys.readouterr().err
    assert "does not fit model.name=test_resnet" in error and error.count("\n") == 1, error
