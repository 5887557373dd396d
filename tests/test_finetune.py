"""Fine-tuning: recipes sized by the data, early stopping, frozen backbones, initial weights."""

import json
import math

import own_data
import pytest
import timm
import torch
import trainer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import tessel.zoo
from tessel.checkpoints import store
from tessel.train import trainer as whole
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.evaluation import load_run
from tessel.train.recipe.load import PACKAGED, flatten, load_recipe
from tessel.train.recipe.plan import plan
from tessel.train.recipe.sizing import AUTO, auto_keys, describe_auto, recorded, sized
from tessel.train.tasks.classify.metrics import ClassificationMetrics
from tessel.train.tasks.classify.task import build_classifier
from tessel.train.tasks.models import no_weights, resolve_pretrained
from tessel.train.trainer import build

SMALL = ["model.name=test_convnext", "data.size=32", "data.workers=0", "run.device=cpu"]


def finetune(name, *overrides):
    return load_recipe(f"finetune/{name}", ["data.root=PATH", *overrides])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trainer.draw_folder(tmp_path_factory.mktemp("images"), train=20, val=5)


def train(images, out, *overrides):
    """Run the recipe finetune/classify on a tiny model. Returns the run directory."""
    command = ["finetune/classify", f"data.root={images}", *SMALL, f"run.out={out}", *overrides]
    assert trainer.main(command) == 0
    return out / "classify"


@pytest.mark.parametrize("name", ["classify", "detect"])
@given(samples=st.integers(1, 2_000_000), processes=st.sampled_from([1, 2, 3, 8]))
def test_sizes_follow_from_the_number_of_images(name, samples, processes):
    samples = max(samples, processes)
    recipe = finetune(name)
    result = sized(recipe, samples=samples, processes=processes)
    found, planned = flatten(result), plan(result, samples=samples, world_size=processes)
    assert AUTO not in [found[key] for key in auto_keys(recipe)] and auto_keys(result) == []
    assert result.data.batch <= samples and result.data.batch % processes == 0
    assert 10 <= result.sched.epochs <= 100
    assert math.isclose(planned.warmup, 0.05 * planned.steps, abs_tol=1 + 0.005 * planned.epoch_steps)
    evaluations = planned.steps / result.eval.every
    assert min(planned.steps, 20) <= evaluations * 1.2 and evaluations <= 45
    assert planned.steps / result.log.every >= min(planned.steps, 90) and result.log.every <= 50
    assert 0.9 <= result.ema.decay <= 0.9998


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps", "every"), [(60, 8, 100, 750, 25), (600_000, 128, 10, 46_875, 2_344)]
)
def test_sizes_of_the_recipe_for_few_and_for_many_images(samples, batch, epochs, steps, every):
    recipe = sized(finetune("classify"), samples=samples)
    assert (recipe.data.batch, recipe.sched.epochs, recipe.eval.every) == (batch, epochs, every)
    assert plan(recipe, samples=samples, world_size=1).steps == steps


def test_given_numbers_are_kept_and_the_others_follow_from_them():
    recipe = sized(finetune("classify", "data.batch=30", "sched.steps=600", "ema.decay=null"), samples=60)
    assert (recipe.data.batch, recipe.sched.epochs, recipe.sched.warmup, recipe.ema.decay) == (30, None, 30, None)
    assert recipe.eval.every == recipe.ckpt.every == 20


def test_images_of_a_segmenter_are_resized_to_the_size_of_its_crops():
    recipe = finetune("segment", "data.size=96")
    result = sized(recipe, samples=60)
    assert result.data.img_scale == (384, 96) and "data.img_scale" in auto_keys(recipe)
    assert "data.img_scale=[384, 96]" in str(describe_auto(recipe, result))
    assert recorded(recipe, sized(finetune("segment", "data.size=128"), samples=60)).data.img_scale == (512, 128)


def test_layers_learn_at_different_rates_only_from_weights():
    def layer_decay(*keys):
        return sized(resolve_pretrained(finetune("classify", *keys)), samples=60).optim.layer_decay

    assert layer_decay("model.name=cswin_tiny") == layer_decay("model.init_from=x.pth") == 0.9
    assert layer_decay("model.pretrained=false") is layer_decay("model.name=biformer_small") is None


def test_training_from_random_weights_does_not_stop_early():
    def patience(*keys):
        return sized(resolve_pretrained(finetune("classify", *keys)), samples=60).sched.patience

    assert patience("model.name=cswin_tiny") == 10 and patience("model.pretrained=false") is None
    assert patience("model.pretrained=false", "sched.patience=4") == 4


def test_continued_run_keeps_its_numbers():
    begun = sized(resolve_pretrained(finetune("classify")), samples=60)
    again = recorded(finetune("classify", "ema.decay=0.5"), begun)
    assert again.data.batch == begun.data.batch and again.model.pretrained is True
    assert again.ema.decay == 0.5 and auto_keys(again) == []


def test_walk_on_sixty_pictures(images, tmp_path, capsys):
    run = train(images, tmp_path, "sched.epochs=3", "model.pretrained=false")
    text = capsys.readouterr().out
    assert "auto: data.batch=8, sched.warmup=0.15" in text and "60 images, 23 steps of 8" in text
    kinds = [record["kind"] for record in trainer.metrics(run)]
    assert kinds.count("train") == 23 and kinds.count("eval") == 6  # every chart has points
    recipe = load_recipe(run / "recipe.yaml")
    assert auto_keys(recipe) == [] and (recipe.data.batch, recipe.eval.every) == (8, 4)
    assert trainer.main(["finetune/classify", f"data.root={images}", *SMALL, "sched.epochs=3",
                         "model.pretrained=false", f"run.out={tmp_path}"]) == 0  # fmt: skip
    assert "is finished" in capsys.readouterr().out


def test_interrupted_run_of_auto_sizes_repeats_an_uninterrupted_one(images, tmp_path):
    keys = ["sched.epochs=1", "model.pretrained=false", "sched.freeze=0.5"]
    straight = train(images, tmp_path / "a", *keys)
    with trainer.before_step(3):
        train(images, tmp_path / "b", *keys)
    resumed = train(images, tmp_path / "b", *keys)
    trainer.assert_same_checkpoint(straight / "checkpoints/step-00000008", resumed / "checkpoints/step-00000008")
    assert trainer.stable_metrics(straight) == trainer.stable_metrics(resumed)


@pytest.fixture
def accuracies(monkeypatch):
    """Top-1 of the next evaluations, in the place of the measured ones; the last one stays."""
    values = []
    compute = ClassificationMetrics.compute

    def planned(self):
        return compute(self) | {"top1": values.pop(0) if len(values) > 1 else values[0]}

    monkeypatch.setattr(ClassificationMetrics, "compute", planned)
    return values


STOPPING = ["sched.steps=40", "sched.patience=3", "eval.every=2", "ckpt.every=5", "model.pretrained=false"]


def test_early_stopping_exports_the_best_weights(images, tmp_path, accuracies, capsys):
    accuracies += [10.0, 30.0, 20.0, 20.0, 29.0, 30.0]
    run = train(images, tmp_path, *STOPPING)
    done = json.loads((run / "DONE").read_text())
    assert done["step"] == 4 and "after step 10" in done["ended"] and "sched.patience=3" in done["ended"]
    assert "training ended after step 10" in capsys.readouterr().out
    best = trainer.tensors(run / "checkpoints/step-00000004")
    exported = load_file(run / "export/model.safetensors")
    assert all(torch.equal(best[f"ema.{name}"], tensor) for name, tensor in exported.items())
    assert not torch.equal(
        best["ema.head.fc.weight"], trainer.tensors(run / "checkpoints/step-00000010")["ema.head.fc.weight"]
    )
    assert json.loads((run / "evaluation/evaluation.json").read_text())["ended"] == done["ended"]


def test_run_that_is_killed_after_its_early_stop_ends_the_same_way(images, tmp_path, accuracies, monkeypatch):
    accuracies += [10.0, 30.0, 20.0, 20.0, 29.0, 30.0]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(whole, "finish", lambda *args: (_ for _ in ()).throw(SystemExit))
        train(images, tmp_path, *STOPPING)
    run = train(images, tmp_path, *STOPPING)
    done = json.loads((run / "DONE").read_text())
    assert done["step"] == 4 and "after step 10" in done["ended"]
    assert max(record["step"] for record in trainer.metrics(run)) == 10


def test_evaluations_of_equal_accuracy_are_compared_by_loss(images, tmp_path, accuracies):
    accuracies += [50.0]
    run = train(images, tmp_path, "sched.steps=8", "sched.patience=9", "eval.every=2", "model.pretrained=false")
    losses = {record["step"]: record["loss"] for record in trainer.metrics(run) if record["kind"] == "eval"}
    assert len(losses) == 4 and json.loads((run / "DONE").read_text())["step"] == min(losses, key=losses.get)


def test_patience_begins_with_the_training_of_the_backbone(images, tmp_path, accuracies):
    accuracies += [30.0, 20.0]
    run = train(images, tmp_path, *STOPPING, "sched.steps=12", "sched.freeze=5")
    assert "after step 10" in json.loads((run / "DONE").read_text())["ended"]  # evaluations at 6, 8 and 10 count


@pytest.mark.slow
def test_processes_stop_early_together(images, tmp_path):
    options = ["finetune/classify", f"data.root={images}", *SMALL, f"run.out={tmp_path}", *STOPPING, "optim.lr=1e-20"]
    done = trainer.run_processes(2, [*options, "sched.warmup=0"])
    assert trainer.exit_codes(done) == [[0, 0]], done.stderr
    assert json.loads((tmp_path / "classify/DONE").read_text())["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "write", "keys"),
    [
        ("segment", own_data.write_masks, []),
        ("detect", own_data.write_coco, ["data.train=[shapes.json, photos]", "data.val=null"]),
        ("detect", own_data.write_yolo, ["data.source=yolo"]),
    ],
)
def test_walk_on_own_masks_and_boxes(tmp_path, task, write, keys):
    write(tmp_path / "own", 24)
    if task == "detect":
        keys = [*keys, "task.detect.channels=64"]
    small = ["model.name=biformer_atto", "data.size=64", "data.workers=0", "run.device=cpu", f"run.out={tmp_path}"]
    command = [f"finetune/{task}", f"data.root={tmp_path}/own", *small, *keys, "sched.steps=12", "sched.patience=2"]
    assert trainer.main(command) == 0
    run = tmp_path / task
    assert len([record for record in trainer.metrics(run) if record["kind"] == "train"]) > 5
    recipe, model = load_run(run)
    assert recipe.data.batch == 4 and list(model.classes)[-2:] == ["circle", "square"]
    # the box AP of a detector stays 0 in so short a training, which does not end it
    assert task == "segment" or json.loads((run / "DONE").read_text())["step"] == 12


def engine_after(steps, *overrides):
    recipe = finetune("classify", "model.name=biformer_atto", "data.size=32", "data.workers=0", *overrides)
    return trainer.run_updates(resolve_pretrained(recipe), steps)


@pytest.fixture
def few(images, tmp_path):
    return [f"data.root={images}", f"run.out={tmp_path}", "run.device=cpu", "sched.steps=4", "sched.warmup=0"]


@pytest.mark.parametrize(
    ("freeze", "trained"), [("2", ("stages.2", "stages.3", "norm", "head")), ("backbone", ("head",))]
)
def test_frozen_parts_do_not_change(few, freeze, trained):
    engine, changed = engine_after(3, *few, f"model.freeze={freeze}", "ema.decay=null")
    names = [name for name, _ in engine.model.named_parameters()]
    assert changed == {name for name in names if name.startswith(trained)} and changed
    fresh = build(engine.recipe, World())[2].model.state_dict()
    now = engine.model.state_dict()
    frozen = [name for name in now if not name.startswith(trained)]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(fresh[name], now[name]) for name in frozen)  # running statistics too


def test_backbone_rests_at_first_and_then_learns(few):
    engine, changed = engine_after(2, *few, "sched.freeze=2", "ema.decay=null")
    assert changed == {"head.fc.weight", "head.fc.bias"}
    means = {name: tensor.clone() for name, tensor in engine.model.named_buffers() if "running_mean" in name}
    assert all(not tensor.any() for tensor in means.values())
    before = {name: tensor.clone() for name, tensor in engine.model.named_parameters()}
    assert engine.step()
    assert all(not torch.equal(before[name], tensor) for name, tensor in engine.model.named_parameters())
    assert any(tensor.any() for name, tensor in engine.model.named_buffers() if "running_mean" in name)


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_frozen_backbone_below_a_decoder(tmp_path, task):
    sections = trainer.SCENES[task] | {"model": {"name": "biformer_atto", "freeze": "backbone"}, "ema": {"decay": None}}
    path = trainer.write_recipe(tmp_path / "tiny.yaml", **sections)
    recipe = load_recipe(path, ["sched.steps=4", "sched.warmup=0", *([] if task == "detect" else ["data.aug.hflip=0"])])
    engine, changed = trainer.run_updates(recipe, 2)
    prefix = {"segment": "backbone.body.", "detect": "backbone.body.body."}[task]
    assert changed and not [name for name in changed if name.startswith(prefix)]
    assert any(name.startswith(prefix) for name, _ in engine.model.named_parameters())


def test_too_many_frozen_stages_are_refused(few):
    with pytest.raises(UserError, match="model.freeze=5, but the backbone has 4 stages"):
        engine_after(1, *few, "model.freeze=5")


def test_pretrained_weights_where_there_are_some():
    def pretrained(*keys):
        return resolve_pretrained(finetune("classify", *keys)).model.pretrained

    assert pretrained("model.name=cswin_tiny") is True and pretrained("model.name=resnet18") is True
    assert pretrained("model.name=biformer_small") is False and pretrained("model.name=biformer_atto") is False
    assert pretrained("model.name=cswin_tiny", "model.init_from=x.pth") is False
    text = no_weights("biformer_small")
    assert (
        "random weights" in text and "https://github.com/rayleizhu/BiFormer" in text and "model.init_from=FILE" in text
    )


def test_no_network_is_one_error_with_remedies(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TESSEL_HOME", str(tmp_path))
    monkeypatch.setattr(store, "urlopen", unreachable)
    with pytest.raises(UserError) as caught:
        build_classifier(resolve_pretrained(finetune("classify", "model.name=cswin_tiny")), 3)
    for fragment in ("could not fetch", "model.init_from=FILE", "model.pretrained=false", str(tmp_path)):
        assert fragment in str(caught.value)


def test_weights_of_a_file(tmp_path):
    source = timm.create_model("biformer_atto", num_classes=7)
    file = tmp_path / "published.pth"
    torch.save({"model": tessel.zoo.to_published("biformer_atto", source.state_dict())}, file)
    recipe = finetune("classify", "model.name=biformer_atto", f"model.init_from={file}", "model.pretrained=false")
    model = build_classifier(recipe, 7)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="there is no such file"):
        build_classifier(finetune("classify", "model.init_from=none.pth", "model.pretrained=false"), 7)
    with pytest.raises(UserError, match="does not fit model.name=litv2_atto"):
        build_classifier(
            finetune("classify", "model.name=litv2_atto", f"model.init_from={file}", "model.pretrained=false"), 7
        )


def test_every_model_of_the_recipe_is_exported_with_its_classes(images, tmp_path):
    run = train(images, tmp_path, "sched.steps=2", "sched.warmup=0", "model.pretrained=false", "task.probe=linear")
    _, model = load_run(run)
    assert model.num_classes == 3 and (PACKAGED / "finetune/classify.yaml").is_file()
