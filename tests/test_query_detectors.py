"""Mask2Former, PEM, RT-DETRv2, D-FINE and Deformable DETR as detectors: losses, boxes, masks, initial weights, runs."""

import copy
import math

import detection
import numpy as np
import pytest
import recipe_runner
import torch
import trainer
from PIL import Image
from torch.nn import functional as F

import tessel
from tessel.train import evaluate
from tessel.train.errors import UserError
from tessel.train.heads.box_detector import group_of
from tessel.train.heads.mask_classifier import MaskOutputs
from tessel.train.heads.mask_inference import instances
from tessel.train.optim.optimizer import build_optimizer
from tessel.train.recipe.schema import Dense, Model, Optim
from tessel.train.report.__main__ import main as report
from tessel.train.tasks import detect
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.options import DetectOptions
from tessel.train.tasks.detect.queries import best_queries

KINDS = list(recipe_runner.NARROW_QUERIES)
MASKS = ("mask2former", "pem")
BOXES = [kind for kind in KINDS if kind not in MASKS]
CLASSES = 5
SHORT = {"sched": {"steps": 3, "warmup": 1}, "log": {"every": 1}, "ckpt": {"every": 1}, "eval": {"every": 3}}


def detector(kind, *, channels=64, **kwargs):
    options = DetectOptions(
        detector=kind, channels=channels, kwargs={**recipe_runner.NARROW_QUERIES[kind], **kwargs}, max_size=128
    )
    return build_detector(Model(name="test_convnext"), options, dense=Dense(), size=64, classes=CLASSES)


def target(count, height=64, width=80):
    corner = torch.rand(count, 2) * 30
    boxes = torch.cat([corner, corner + 10 + torch.rand(count, 2) * 20], 1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.randint(CLASSES, (count,)), "masks": masks}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_trained_and_predictions_are_in_pixels(kind):
    model = detector(kind)
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 64)]
    targets = [target(3), target(1, 50, 64)]
    # an image without objects, and a micro-batch without any
    for wanted in (targets, [targets[0], target(0, 50, 64)], [target(0), target(0, 50, 64)]):
        losses = model(images, wanted)
        assert all("loss" in name and value.isfinite() for name, value in losses.items())
        sum(losses.values()).backward()
        assert not [n for n, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        model.zero_grad()
    with torch.inference_mode():
        found = model.eval()([torch.rand(3, 30, 70), torch.rand(3, 100, 64)])
    for objects, (height, width) in zip(found, ((30, 70), (100, 64)), strict=True):
        boxes = objects["boxes"]
        assert objects["scores"].dtype == boxes.dtype == torch.float32 and len(boxes) <= 100
        assert (boxes >= 0).all() and boxes[:, 0::2].max() <= width and boxes[:, 1::2].max() <= height
        assert objects["labels"].min() >= 0 and objects["labels"].max() < CLASSES
        assert ("masks" in objects) == (kind in MASKS)
        if "masks" in objects:
            assert objects["masks"].shape == (len(boxes), 1, height, width)
    sum(model.train()(images, targets).values()).backward()
    # no weight has two names, so that exports, checkpoints and counts have each once
    state = model.state_dict(keep_vars=True)
    assert len({id(tensor) for tensor in state.values()}) == len(state)
    assert len(copy.deepcopy(model).state_dict()) == len(state)
    assert {name for name in model.no_weight_decay() if name.startswith("head.")}
    with torch.autocast("cpu", torch.bfloat16):
        assert all(value.dtype == torch.float32 for value in model(images, targets).values())


@pytest.mark.parametrize("kind", BOXES)
def test_parts_of_the_loss_sum_to_that_of_the_library(kind):
    head = detector(kind).head
    images, mask = torch.rand(2, 3, 64, 96), torch.ones(2, 64, 96)
    wanted = [{"class_labels": torch.tensor([1, 3]), "boxes": torch.rand(2, 4) * 0.3 + 0.3}] * 2
    torch.manual_seed(0)
    theirs = head.library(pixel_values=images, pixel_mask=mask, labels=wanted).loss
    torch.manual_seed(0)
    assert sum(head.losses(images, mask, wanted).values()).item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("kind", BOXES)
def test_a_perfect_query_finds_its_box_in_the_given_image(kind, monkeypatch):
    """Boxes are shares of the padded batch; the smaller image is resized and padded before."""
    model = detector(kind).eval()
    canvas = []

    def found(images, mask):
        canvas[:] = images.shape[-2:]
        logits = torch.full((2, 3, CLASSES), -9.0)
        logits[1, 2, 4] = 5.0
        # the image of 40 x 60 pixels becomes 64 x 96
        box = torch.tensor([32 / canvas[1], 32 / canvas[0], 32 / canvas[1], 16 / canvas[0]])
        return logits, box.expand(2, 3, 4)

    monkeypatch.setattr(model.head, "forward", found)
    objects = model([torch.rand(3, 128, 64), torch.rand(3, 40, 60)])[1]
    assert canvas[0] > 64 or canvas[1] > 96
    assert objects["labels"][0] == 4 and objects["scores"][0] > 0.99
    torch.testing.assert_close(objects["boxes"][0], torch.tensor([10.0, 15.0, 30.0, 25.0]))


def test_equal_boxes_are_not_suppressed():
    logits, boxes = torch.full((1, 4, CLASSES), -9.0), torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 4, 4)
    logits[0, 1:3, 2] = torch.tensor([3.0, 4.0])
    found, labels, scores = best_queries(logits, boxes)
    assert labels[0, :2].tolist() == [2, 2] and torch.equal(found[0, 0], found[0, 1])
    torch.testing.assert_close(scores[0, :3], torch.tensor([4.0, 3.0, -9.0]).sigmoid())


@pytest.mark.parametrize("kind", KINDS)
def test_layer_decay_slows_the_backbone_and_not_the_head(kind):
    model = detector(kind)
    groups = build_optimizer(model, Optim(layer_decay=0.5), 1.0).param_groups
    scales = {id(weight): group["lr_scale"] for group in groups for weight in group["params"]}
    named = {name: scales[id(weight)] for name, weight in model.named_parameters() if weight.requires_grad}
    stem = next(scale for name, scale in named.items() if name.startswith("backbone."))
    head = {scale for name, scale in named.items() if name.startswith("head.")}
    assert stem == min(named.values()) < 0.3 and head == {1.0}


def test_instances_have_their_masks_scores_and_boxes():
    masks = torch.full((1, 4, 8, 8), -20.0)
    masks[0, 0, 2:4, 4:6] = 20.0
    masks[0, 2, :, :2] = 20.0
    classes = torch.full((1, 4, CLASSES + 1), -20.0)
    classes[0, 0, 3], classes[0, 1, 1], classes[0, 2, 0], classes[0, 3, CLASSES] = 20.0, 20.0, 20.0, 20.0
    found = instances(MaskOutputs([classes], [masks]), 0, canvas=(32, 32), size=(32, 24), wanted=(64, 48), count=3)
    assert sorted(found["labels"].tolist()) == [0, 3]  # the mask of query 1 is empty
    assert (found["scores"] > 0.9).all()
    first = found["labels"].tolist().index(3)
    x1, y1, x2, y2 = found["boxes"][first].tolist()
    assert (x1, y1, x2, y2) == pytest.approx((32, 16, 48, 32), abs=3)
    mask = found["masks"][first, 0]
    assert mask.shape == (64, 48) and mask[int(y1) : int(y2), int(x1) : int(x2)].float().mean() > 0.9
    assert mask.sum() == mask[int(y1) : int(y2), int(x1) : int(x2)].sum()


def test_one_query_can_have_two_classes():
    masks = F.pad(torch.full((1, 1, 4, 4), 9.0), (0, 4, 0, 4), value=-9.0)
    classes = torch.zeros(1, 1, CLASSES + 1)
    found = instances(MaskOutputs([classes], [masks]), 0, canvas=(8, 8), size=(8, 8), wanted=(8, 8), count=3)
    assert len(set(found["labels"].tolist())) == 3 and len(found["masks"]) == 3


@pytest.mark.parametrize("kind", BOXES)
def test_initial_weights_of_the_heads(kind):
    model = detector(kind).head.library
    heads = model if kind == "deformable_detr" else model.model.decoder
    for score, box in zip(heads.class_embed, heads.bbox_embed, strict=True):
        assert score.bias.tolist() == pytest.approx([-math.log(99)] * CLASSES)
        assert not box.layers[-1].weight.any()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() for norm in norms) and bool(norms) == (kind != "deformable_detr")


def test_the_backbone_keeps_its_weights_and_batch_norms():
    options = DetectOptions(detector="rtdetrv2", channels=64, kwargs=recipe_runner.NARROW_QUERIES["rtdetrv2"])
    model = build_detector(Model(name="biformer_atto"), options, dense=Dense(), size=64, classes=2)
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(norm.weight.requires_grad for norm in norms)
    assert not [name for name in model.head.state_dict() if "backbone" in name]
    assert [p for name, p in model.named_parameters() if name.startswith("backbone.body.body.")]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("loss_bbox", ("loss_bbox", "")),
        ("loss_bbox_3", ("loss_bbox", "_aux")),
        ("loss_vfl_aux_0", ("loss_vfl", "_aux")),
        ("loss_giou_dn_2", ("loss_giou", "_dn")),
    ],
)
def test_groups_of_losses(name, expected):
    assert group_of(name) == expected


@pytest.mark.parametrize(
    "kind, kwargs, message",
    [
        ("rtdetrv2", {"queries": 3}, "task.detect.kwargs: queries is no setting of rtdetrv2, which takes activation"),
        ("d_fine", {"d_model": 32}, "d_model is no setting of d_fine"),
        ("deformable_detr", {"num_queries": "many"}, "task.detect.detector=deformable_detr cannot be built"),
        ("pem", {"num_attention_heads": 3}, "task.detect.kwargs: num_attention_heads=3 do not divide hidden_dim=64"),
        ("mask2former", {"queries": 3}, "task.detect.kwargs has no option queries; it takes class_weight"),
    ],
)
def test_errors_name_the_setting(kind, kwargs, message):
    with pytest.raises(UserError, match=message):
        detector(kind, **kwargs)


def test_too_small_images_are_named():
    model = detector("rtdetrv2", num_queries=200)
    with pytest.raises(UserError, match="64 x 96 pixels have 126 places for 200 queries; use larger ones"):
        model([torch.rand(3, 64, 80)], [target(1)])


def write_recipe(path, coco, kind):
    """A recipe of 3 steps of 4 images in micro-batches of 2."""
    path.parent.mkdir(exist_ok=True)
    options = {"detector": kind, "channels": 64, "max_size": 120, "min_size": [48, 64]}
    task = {"kind": "detect", "detect": {**options, "kwargs": recipe_runner.NARROW_QUERIES[kind]}}
    return detection.write_recipe(path, coco, task=task, **SHORT)


SLOW = [pytest.param(kind, marks=pytest.mark.slow if kind == "rtdetrv2" else pytest.mark.large) for kind in KINDS]


@pytest.mark.parametrize("kind", SLOW)
def test_resume_is_exact_and_the_run_is_evaluated_drawn_and_predicts(kind, tmp_path, capsys):
    coco = detection.draw_coco(tmp_path / "coco")
    straight = write_recipe(tmp_path / "straight" / "tiny.yaml", coco, kind)
    recipe = write_recipe(tmp_path / "resumed" / "tiny.yaml", coco, kind)
    assert trainer.train(straight) == 0
    with trainer.before_step(2):
        assert trainer.train(recipe) == 0
    assert trainer.train(recipe) == 0
    assert "at step 2 (exact)" in capsys.readouterr().out
    one, other = (path.parent / "runs/tiny" for path in (straight, recipe))
    trainer.assert_same_checkpoint(*(run / "checkpoints/step-00000003" for run in (one, other)))
    last = [record for record in trainer.metrics(one) if record["kind"] == "eval"][-1]
    assert last["count"] == 6 and ("mask_ap" in last) == (kind in MASKS)
    assert evaluate.main([str(one), "--overlays", "2"]) == 0
    assert f"box_ap {last['box_ap']:.2f}" in capsys.readouterr().out
    assert report([str(one)]) == 0 and "AP by class" in (one / "report/index.html").read_text()
    state = trainer.tensors(one / "checkpoints/step-00000003")
    model = detect.load(one / "export")
    assert all(torch.equal(tensor, state[f"ema.{name}"]) for name, tensor in model.state_dict().items())
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "image.png")
    (result,) = tessel.load(one).predict(tmp_path / "image.png", min_score=0.0)
    assert len(result.boxes) and result.save(tmp_path / "drawn.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask2former", "rtdetrv2"])
def test_a_run_in_bfloat16_with_layer_decay(kind, tmp_path):
    recipe = write_recipe(tmp_path / "run/tiny.yaml", detection.draw_coco(tmp_path / "coco"), kind)
    assert trainer.train(recipe, "parallel.precision=bf16", "optim.layer_decay=0.8", "eval.every=null") == 0
    assert all(
        record["loss"] > 0 for record in trainer.metrics(recipe.parent / "runs/tiny") if record["kind"] == "train"
    )
    assert all(
        tensor.isfinite().all() for tensor in detect.load(recipe.parent / "runs/tiny/export").state_dict().values()
    )


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(("rtdetrv2", "d_fine", "pem"), marks=pytest.mark.slow),
        pytest.param(("deformable_detr", "mask2former"), marks=pytest.mark.large),
    ],
)
def test_two_processes_learn_the_same(kinds, tmp_path):
    """With FSDP2, losses, and weights after two updates, are those of one process."""
    coco = detection.draw_coco(tmp_path / "coco")
    recipes = {kind: write_recipe(tmp_path / kind / "tiny.yaml", coco, kind) for kind in kinds}
    shared = ["model.name=litv2_atto", "sched.steps=2", "ckpt.every=2", "eval.every=null"]
    more = [*shared, "run.name=two", "parallel.strategy=fsdp"]
    done = trainer.run_processes(2, *([recipe, *more] for recipe in recipes.values()))
    assert trainer.exit_codes(done) == [[0, 0]] * len(kinds), done.stdout + done.stderr
    for kind, recipe in recipes.items():
        assert trainer.train(recipe, *shared, "run.name=one") == 0
        one, two = (recipe.parent / "runs" / name for name in ("one", "two"))
        losses, found = (
            [line["loss"] for line in trainer.stable_metrics(run) if line["kind"] == "train"] for run in (one, two)
        )
        assert found == pytest.approx(losses, rel=1e-4) and len(losses) == 2, kind
        weights, found = (dict(detect.load(run / "export").named_parameters()) for run in (one, two))
        # a weight without effect, as the bias of a key, moves by chance
        apart = torch.cat([(found[name] - want).detach().flatten() for name, want in weights.items()])
        assert apart.abs().mean() < 1e-7, kind
