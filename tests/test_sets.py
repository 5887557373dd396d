"""ImageNet's variant evaluation sets in miniature: painted images and a model that reads the class from their color."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import trainer
from PIL import Image
from timm.data.real_labels import RealLabelsImagenet
from torch import nn

from tessel.train import evaluate
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.tasks.classify import imagenet_variants as sets
from tessel.train.tasks.classify.imagenet_variants import ALEXNET_ERROR, VariantEvaluator

SYNSETS = timm.data.ImageNetInfo().label_names()
CLASSES = SYNSETS[:12]


class ColorReader(nn.Module):
    """Logits from an image's color: highest for class red / 10, then class green / 10, then classes 0, 1, ..."""

    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}

    def forward(self, x):
        first, second = ((x[:, channel].mean((1, 2)) * 25.5).round().long() for channel in (0, 1))
        logits = -torch.arange(len(CLASSES), dtype=torch.float32).repeat(len(x), 1)
        return logits.scatter(1, second[:, None], 10.0).scatter(1, first[:, None], 20.0)


def paint(path: Path, first: int, second: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), (10 * first, 10 * second, 0), dtype=np.uint8)).save(path)


@pytest.fixture
def evaluator(tmp_path):
    recipe = load_recipe(trainer.write_recipe(tmp_path / "x.yaml", data={"root": "x", "size": 16, "eval_batch": 4}))
    return VariantEvaluator(recipe, ColorReader().eval(), CLASSES, World())


def test_top1_and_top5_over_all_classes(evaluator, tmp_path):
    for number, name in enumerate(CLASSES):
        paint(tmp_path / "val" / name / "right.png", number, 11 - number)
        paint(tmp_path / "val" / name / "second.png", (number + 1) % 12, number)
        paint(tmp_path / "val" / name / "wrong.png", (number + 1) % 12, (number + 2) % 12)
    metrics = evaluator.evaluate("val", tmp_path / "val")
    assert metrics["top1"] == pytest.approx(100 / 3) and metrics["count"] == 36 and metrics["classes"] == 12
    # wrong.png is in the top 5 only where its class is 0, 1 or 2, since these have the next logits
    assert metrics["top5"] == pytest.approx(100 * (24 + 3) / 36)


def test_a_subset_masks_the_other_classes(evaluator, tmp_path):
    subset = [CLASSES[2], CLASSES[5], CLASSES[9]]
    paint(tmp_path / "a" / subset[0] / "0.png", 7, 2)  # class 7 is masked; the highest of the three is class 2
    paint(tmp_path / "a" / subset[1] / "0.png", 5)
    paint(tmp_path / "a" / subset[2] / "0.png", 2, 9)
    paint(tmp_path / "a" / subset[2] / "1.png", 7, 8)  # 7 and 8 are masked; the prediction is class 2, which is wrong
    metrics = evaluator.evaluate("a", tmp_path / "a")
    assert (metrics["top1"], metrics["count"], metrics["classes"]) == (50.0, 4, 3) and metrics["top5"] == 100


def test_folders_named_by_class_number(evaluator, tmp_path):
    for number in (0, 2, 10):  # sorted as text, 10 comes before 2
        paint(tmp_path / "v2" / str(number) / "0.png", number)
    assert evaluator.evaluate("v2", tmp_path / "v2")["top1"] == 100
    paint(tmp_path / "v2" / "12" / "0.png", 1)
    with pytest.raises(UserError, match="has the class 12, which the model does not have"):
        evaluator.evaluate("v2", tmp_path / "v2")


def test_unknown_class_and_missing_folder_are_errors(evaluator, tmp_path):
    paint(tmp_path / "r" / SYNSETS[500] / "0.png", 1)
    with pytest.raises(UserError, match=SYNSETS[500]):
        evaluator.evaluate("r", tmp_path / "r")
    with pytest.raises(UserError, match="nowhere cannot be read"):
        evaluator.evaluate("sketch", tmp_path / "nowhere")


def test_corruption_error_is_relative_to_alexnet(evaluator, tmp_path):
    """Of two images of a severity, one is classified correctly; in fog both, in snow none from severity 3 on."""
    for corruption in ALEXNET_ERROR:
        for severity in range(1, 6):
            folder = tmp_path / "c" / "group" / corruption / str(severity)
            paint(folder / CLASSES[3] / "0.png", 4 if corruption == "snow" and severity > 2 else 3)
            paint(folder / CLASSES[4] / "0.png", 4 if corruption == "fog" else 3)
    metrics = evaluator.evaluate("c", tmp_path / "c")
    errors = {name: {"fog": 0.0, "snow": 80.0}.get(name, 50.0) for name in ALEXNET_ERROR}
    assert metrics["errors"] == pytest.approx(errors) and metrics["folders"] == 75
    relative = [errors[name] / (100 * reference) for name, reference in ALEXNET_ERROR.items()]
    assert metrics["mce"] == pytest.approx(100 * sum(relative) / 15)
    assert metrics["top1"] == pytest.approx(100 - sum(errors.values()) / 15)


def test_partial_corruptions_have_no_mce(evaluator, tmp_path):
    paint(tmp_path / "c" / "fog" / "1" / CLASSES[3] / "0.png", 3)
    metrics = evaluator.evaluate("c", tmp_path / "c")
    assert metrics["mce"] is None and metrics["top1"] == 100 and metrics["errors"] == {"fog": 0.0}
    with pytest.raises(UserError, match="CORRUPTION/SEVERITY/CLASS"):
        evaluator.evaluate("c", tmp_path / "c" / "fog" / "1")


def test_real_labels_of_imagenet(evaluator, tmp_path):
    """Each of an image's labels counts as correct; images without labels are not counted."""
    labels = RealLabelsImagenet(range(50_000)).real_labels
    single = [file for file, found in labels.items() if len(found) == 1 and found[0] < 12][:2]
    several = next(file for file, found in labels.items() if len(found) > 1 and max(found) < 12)
    none = next(file for file, found in labels.items() if not found)
    a, b = (labels[file][0] for file in single)
    for file, predicted in ((single[0], a), (single[1], (b + 1) % 12), (several, labels[several][-1]), (none, 0)):
        paint((tmp_path / "val" / CLASSES[7] / file).with_suffix(".png"), predicted, predicted)
    metrics = evaluator.evaluate("real", tmp_path / "val")
    assert metrics["count"] == 3 and metrics["top1"] == pytest.approx(200 / 3)
    paint(tmp_path / "val" / CLASSES[7] / "other.png", 1)
    with pytest.raises(UserError, match=r"other.png is not named like an image of ImageNet's validation set"):
        evaluator.evaluate("real", tmp_path / "val")


@pytest.mark.parametrize("text", ["sketc=x", "v2", "v2=", "=x"])
def test_sets_must_be_given_as_name_and_folder(text):
    with pytest.raises(UserError, match="NAME=FOLDER with NAME one of val, real, v2, a, r, sketch, c, fgsm, pgd, or"):
        sets.parse_sets([text])


def test_sets_by_the_usual_folders(tmp_path):
    for name in ("imagenet/val", "imagenet/imagenet-a", "imagenet-r", "sketch"):
        (tmp_path / name).mkdir(parents=True)
    root = tmp_path / "imagenet"
    found = sets.parse_sets(["a,r,val", "real", f"v2={tmp_path}"], root)
    assert found == {
        "a": root / "imagenet-a",
        "r": tmp_path / "imagenet-r",
        "val": root / "val",
        "real": root / "val",
        "v2": tmp_path,
    }
    with pytest.raises(
        UserError, match="--sets c: neither in .*imagenet nor beside it is a folder imagenet-c; give c="
    ):
        sets.parse_sets(["c"], root)


class Linear(nn.Module):
    """Logits of the classes 0 and 1 by the brightness of an image; the others are much lower."""

    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}

    def forward(self, x):
        brightness = x.mean((1, 2, 3))
        return torch.stack([brightness, -brightness, *[torch.full_like(brightness, -9.0)] * 10], 1)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_attacks_change_images_by_one_gray_level(name, evaluator, tmp_path):
    """Images one level above the threshold are misclassified after the attack, those two levels above are not."""
    model = Linear().eval()
    attacked = VariantEvaluator(evaluator.recipe, model, CLASSES, World())
    for number, gray in enumerate((128, 129, 160)):  # the threshold lies at 127.5
        path = tmp_path / "val" / CLASSES[0] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), gray, np.uint8)).save(path)
    assert attacked.evaluate("val", tmp_path / "val")["top1"] == 100
    attack, images = sets.ATTACKS[name], sets.ImageFolder(tmp_path / "val")
    found = attacked.accuracy(images, [0, 1], lambda _, labels: torch.eye(2).bool()[labels], attack)
    assert found["top1"] == pytest.approx(200 / 3)
    images = torch.full((1, 3, 4, 4), (128 / 255 - 0.5) / 0.25)
    moved = attacked.attacked(images, torch.tensor([0]), [0, 1], *attack)
    torch.testing.assert_close(images - moved, torch.full_like(images, 1 / 255 / 0.25))
    black = torch.full((1, 3, 4, 4), -0.5 / 0.25)
    assert torch.equal(attacked.attacked(black, torch.tensor([0]), [0, 1], *attack), black), "no pixel leaves 0..1"
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_command_line_keeps_earlier_results(tmp_path, capsys):
    images = trainer.draw_folder(tmp_path / "images", train=4, val=2)
    for split in ("train", "val"):
        for number in range(3):
            (images / split / f"class_{number}").rename(images / split / CLASSES[number])
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", data={"root": str(images)}, sched={"steps": 2, "warmup": 0})
    assert trainer.train(recipe, "ckpt.every=2", "eval.every=2", "model.pretrained=false") == 0
    run = tmp_path / "runs/tiny"
    wanted = json.loads((run / "evaluation/evaluation.json").read_text())
    for target in (run, run / "checkpoints/step-00000002"):
        assert evaluate.main([str(target), "--sets", f"val={images}/val"]) == 0
        assert f"val: top1 {wanted['top1']:.2f}" in capsys.readouterr().out
    (images / "val" / CLASSES[1]).rename(tmp_path / "away")
    (images / "train").rename(tmp_path / "train")  # the training data is not needed
    assert evaluate.main([str(run), "--sets", f"a={images}/val", "--data", "eval_batch=3"]) == 0
    found = json.loads((run / "sets.json").read_text())
    assert set(found) == {"val", "a"} and found["a"]["classes"] == 2 and found["a"]["step"] == 2
    assert found["val"]["top1"] == pytest.approx(wanted["top1"]) and found["a"]["folder"] == f"{images}/val"
    assert evaluate.main([str(run), "--sets", f"real={images}/val"]) == 1
    error = capsys.readouterr().err
    assert "as real needs" in error and error.count("\n") == 1
    assert json.loads((run / "sets.json").read_text()) == found


def test_evaluation_of_a_model_by_name(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("biformer_atto").eval()
    torch.save(model.state_dict(), tmp_path / "published.pth")
    images = trainer.draw_folder(tmp_path / "images", train=1, val=6)
    for number in range(3):
        (images / "val" / f"class_{number}").rename(images / "val" / SYNSETS[number])
    options = ["--data", f"root={images}", "size=64", "--weights", str(tmp_path / "published.pth")]
    assert evaluate.main(["biformer_atto", *options]) == 0
    printed = capsys.readouterr().out
    transform = timm.data.create_transform(**{**timm.data.resolve_model_data_config(model), "input_size": (3, 64, 64)})
    hits = [
        int(model(transform(Image.open(file).convert("RGB"))[None])[0, :3].argmax()) == number
        for number in range(3)
        for file in sorted((images / "val" / SYNSETS[number]).iterdir())
    ]
    assert f"val: top1 {100 * np.mean(hits):.2f}" in printed and "18 images of 3 classes" in printed
    assert evaluate.main(["biformer_atto", *options, "--sets", f"v2={images}/val"]) == 0
    assert "v2: top1" in capsys.readouterr().out
    (images / "val").rename(images / "held")
    assert evaluate.main(["biformer_atto", *options, "data.val_split=held"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["biformer_atto"], "no weights that can be downloaded; --weights FILE"),
        (["biformer_atto", "--weights", "nowhere.pth"], "no such file"),
        (["biformer_smal", "--weights", "nowhere.pth"], "did you mean biformer_small"),
        (
            ["biformer_smal"],
            "neither a run directory nor a checkpoint: it has no recipe.yaml; did you mean the model bifo",
        ),
        (["biformer_atto", "--overlays", "2"], "--overlays draws predictions of a run"),
        (["biformer_atto", "--weights", __file__, "--data", "source=tar"], "data.source=tar: a model without a run"),
        (["biformer_atto", "optim.lr=1"], "optim.lr=1 has no effect on an evaluation, which accepts data., "),
        (["biformer_small", "--data", "sise=64"], "did you mean data.size"),
    ],
)
def test_models_that_cannot_be_evaluated_are_errors(arguments, message, capsys):
    assert evaluate.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_negative_number_of_overlays_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["biformer_atto", "--overlays", "-2"])
    assert "-2 is not a number of pictures" in capsys.readouterr().err
