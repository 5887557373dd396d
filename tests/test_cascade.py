"""Cascade Mask R-CNN: stages against examples worked out by hand, learning, resume, exports, published names."""

import json

import detection
import pytest
import timm
import torch
import trainer
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import generalized_box_iou_loss

from tessel.export import OneImageDetector, export, formats
from tessel.export import load as load_export
from tessel.train.errors import UserError
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks import detect
from tessel.train.tasks.detect.cascade import BOX_WEIGHTS, CascadeRoIHeads, of_class, refine
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.options import DetectOptions
from tessel.zoo import to_published

HEADS = ["linear", "convolutions"]
SMALL = {"box_batch_size_per_image": 32, "box_detections_per_img": 5, "box_score_thresh": 0.0}


def built(head="linear", classes=3, name="litv2_atto", **keys):
    options = {"channels": 32, "max_size": 200, "anchor": 8, "kwargs": SMALL, **keys}
    options = DetectOptions(detector="cascade_mask_rcnn", box_head=head, **options)
    torch.manual_seed(0)
    return build_detector(Model(name=name), options, dense=Dense(), size=64, classes=classes)


class Fixed(nn.Module):
    """A predictor, pool or head that returns a function of what it was called with."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def stage(overlap, weights, predict):
    """A stage without pooling and mask: `predict(boxes)` of all images gives logits and encoded boxes."""
    pool = Fixed(lambda features, boxes, shapes: torch.cat(boxes))
    masks = Fixed(lambda boxes: torch.zeros(len(boxes), 3, 28, 28))
    sampling, results = (512, 0.25), (0.05, 0.5, 100)
    rest = (pool, nn.Identity(), masks)
    return RoIHeads(pool, nn.Identity(), Fixed(predict), overlap, overlap, *sampling, weights, *results, *rest)


def test_every_stage_matches_the_refined_boxes_by_its_own_overlap():
    """A true box of 10 x 10 and proposals that cover 0.55, 0.65 and 0.3 of it; the first stage moves all by 1 pixel."""
    true = torch.tensor([[20.0, 20, 30, 30]])
    # a box of width w at the same left edge overlaps the true box by w / 10
    proposals = [torch.tensor([[20.0, 20, 25.5, 30], [20, 20, 26.5, 30], [20, 20, 23, 30]])]
    seen = []

    def predict(boxes):
        seen.append(boxes)
        width = boxes[:, 2] - boxes[:, 0]
        # the right edge moves by 1: the center by 0.5, the width from w to w + 1
        shift, growth = 0.5 / width, ((width + 1) / width).log()
        zero = torch.zeros_like(width)
        weights = BOX_WEIGHTS[len(seen) - 1]
        deltas = torch.stack([shift * weights[0], zero, growth * weights[2], zero], 1)
        return torch.zeros(len(boxes), 3), deltas

    stages = [stage(overlap, weights, predict) for overlap, weights in zip((0.5, 0.6, 0.7), BOX_WEIGHTS, strict=True)]
    heads = CascadeRoIHeads(stages, giou=False).train()
    target = {"boxes": true, "labels": torch.tensor([2]), "masks": torch.zeros(1, 64, 64, dtype=torch.uint8)}
    losses = heads({}, proposals, [(64, 64)], [target])[1]

    widths = [(boxes[:, 2] - boxes[:, 0]).tolist() for boxes in seen]
    # the true box comes last, and it is not among the refined ones
    assert widths == [pytest.approx([w + n for w in (5.5, 6.5, 3)] + [10]) for n in range(3)]
    # positive are 5.5, 6.5 and 10 at 0.5, then 6.5, 7.5 and 10 at 0.6, then 7.5, 8.5 and 10 at 0.7: three of four each
    chance = torch.tensor(3.0).log().item()
    expected = {f"loss_classifier_{n}": chance * weight for n, weight in ((1, 1), (2, 0.5), (3, 0.25))}
    for number, (weight, scale) in enumerate(((1, 1), (0.5, 2), (0.25, 3)), 1):
        total = 0.0
        for width in (4.5 + number, 5.5 + number, 10.0):
            errors = [10 * scale * ((10 - width) / 2 - 0.5) / width, 0]
            wanted = torch.tensor([10 / width, 1]).log() - torch.tensor([(width + 1) / width, 1]).log()
            errors += (5 * scale * wanted).tolist()
            total += sum(0.5 * e * e if abs(e) < 1 else abs(e) - 0.5 for e in errors)
        expected[f"loss_box_reg_{number}"] = weight * total / 4
    mask = torch.tensor(2.0).log().item()  # masks are empty, logits are 0
    expected |= {f"loss_mask_{n}": mask * weight for n, weight in ((1, 1), (2, 0.5), (3, 0.25))}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_a_box_per_class_is_refined_by_the_objects_class_and_background_by_the_likeliest():
    one = stage(0.5, (1.0, 1.0, 1.0, 1.0), None)
    boxes = [torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20]]), torch.tensor([[50.0, 50, 60, 60]])]
    deltas = torch.zeros(3, 3, 4)
    deltas[:, 0, 0], deltas[:, 1, 0], deltas[:, 2, 0] = 5.0, 0.1, 0.2  # moves to the right by 50, 1 and 2 pixels
    logits = torch.tensor([[9.0, 1, 0], [9, 1, 0], [9, 0, 1]])  # the background is always the likeliest of all
    shapes = [(64, 64), (64, 61)]
    assert of_class(deltas.flatten(1), torch.tensor([0, 1, 2]))[:, 0].tolist() == pytest.approx([5, 0.1, 0.2])
    moved = refine(one, logits, deltas.flatten(1), boxes, shapes, torch.tensor([2, 0, 0]))
    assert [found[:, 0].tolist() for found in moved] == [pytest.approx([2, 11]), pytest.approx([52])]
    assert moved[1][0, 2] == 61  # clipped to the image
    predicted = refine(one, logits, deltas.flatten(1), boxes, shapes)
    assert [found[:, 0].tolist() for found in predicted] == [pytest.approx([1, 11]), pytest.approx([52])]


def test_detections_have_the_mean_of_logits_and_masks_and_the_boxes_of_the_last_stage():
    """One proposal, which two stages move to the right by a pixel each, and the last by another one."""
    logits = torch.tensor([[[0.0, 3, 1]], [[0, 1, 1]], [[0, 2, 4]]])
    stages = []
    for number, weights in enumerate(BOX_WEIGHTS):
        # `weights` would be taken from the last iteration
        def predict(boxes, number=number, weights=weights):
            return logits[number], torch.tensor([[0.1 * weights[0], 0, 0, 0]])

        one = stage(0.5, weights, predict)
        one.mask_predictor = Fixed(lambda boxes, number=number: torch.full((len(boxes), 3, 28, 28), float(number)))
        stages.append(one)
    heads = CascadeRoIHeads(stages, giou=False).eval()
    (found,), losses = heads({}, [torch.tensor([[10.0, 10, 20, 20]])], [(64, 64)])
    assert losses == {}
    scores = logits.mean(0).softmax(-1)[0, 1:]
    order = scores.argsort(descending=True)
    torch.testing.assert_close(found["scores"], scores[order])
    assert found["labels"].tolist() == (order + 1).tolist()
    torch.testing.assert_close(found["boxes"], torch.tensor([[13.0, 10, 23, 20]]).expand(2, 4))
    mean = torch.tensor([0.0, 1, 2]).sigmoid().mean()
    torch.testing.assert_close(found["masks"], mean.expand(2, 1, 28, 28))


def test_giou_loss_is_of_decoded_boxes():
    one = stage(0.5, BOX_WEIGHTS[0], None)
    boxes = [torch.tensor([[10.0, 10, 20, 20], [30, 30, 50, 40]])]
    true = torch.tensor([[12.0, 9, 21, 22], [31, 31, 45, 44]])
    deltas = torch.zeros(2, 3, 4)
    deltas[0, 2, 0] = 1.0  # of the object's class: moved by a tenth of its width; the other box is background
    encoded = one.box_coder.encode_single(true, boxes[0])
    heads = CascadeRoIHeads([one], giou=True)
    loss = heads.box_loss(one, deltas.flatten(1), boxes, torch.tensor([2, 0]), encoded)
    wanted = generalized_box_iou_loss(torch.tensor([[11.0, 10, 21, 20]]), true[:1], reduction="sum")
    torch.testing.assert_close(loss, 10 * wanted / 2)


@pytest.mark.parametrize("head", HEADS)
def test_layers_of_the_box_heads(head):
    model = built(head, channels=64)
    stages = model.roi_heads.stages
    assert [tuple(one.box_coder.weights) for one in stages] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert [one.proposal_matcher.high_threshold for one in stages] == [0.5, 0.6, 0.7]
    for one in stages:
        norms = [module for module in one.box_head.modules() if isinstance(module, nn.BatchNorm2d)]
        convolutions = [module for module in one.box_head.modules() if isinstance(module, nn.Conv2d)]
        assert len(norms) == len(convolutions) == (4 if head == "convolutions" else 0)
        assert one.box_predictor.bbox_pred.out_features == (4 * 4 if head == "convolutions" else 4)
        assert one.box_predictor.cls_score.out_features == 4 and one.fg_bg_sampler.batch_size_per_image == 32
    assert len({id(one.box_roi_pool) for one in stages}) == 1 and len({id(one.mask_head) for one in stages}) == 3


@pytest.mark.parametrize(
    ("kwargs", "fragment"),
    [
        ({"box_fg_iou_thresh": 0.6}, "box_fg_iou_thresh is not an argument of cascade_mask_rcnn"),
        ({"bbox_reg_weights": [1, 2, 3, 4]}, "bbox_reg_weights is not an argument of cascade_mask_rcnn"),
        ({"box_nms_thresh": 2}, "box_nms_thresh=2 with cascade_mask_rcnn"),
    ],
)
def test_arguments_that_differ_by_stage_are_refused(kwargs, fragment):
    with pytest.raises(UserError, match=fragment):
        built(kwargs=kwargs)


def test_box_head_is_refused_without_a_cascade():
    with pytest.raises(UserError, match="task.detect.box_head has no effect with task.detect.detector=mask_rcnn"):
        load_recipe("coco/mask_rcnn_1x_litv2_small", ["task.detect.box_head=convolutions"])


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return detection.draw_coco(tmp_path_factory.mktemp("coco"))


@pytest.mark.slow
def test_a_run_resumes_exactly_and_its_export_finds_boxes_and_masks(tmp_path, coco, capsys):
    sections = {"sched": {"steps": 3, "warmup": 1}, "log": {"every": 1}, "ckpt": {"every": 1}, "eval": {"every": 3}}
    recipe = detection.write_recipe(tmp_path / "tiny.yaml", coco, **sections)
    keys = ["task.detect.detector=cascade_mask_rcnn", "task.detect.box_head=convolutions", "task.detect.anchor=8"]
    keys += ["task.detect.channels=16", f"task.detect.kwargs={json.dumps(SMALL)}", "model.name=litv2_atto"]
    assert trainer.train(recipe, *keys, "run.name=straight") == 0
    with trainer.before_step(2):
        assert trainer.train(recipe, *keys) == 0
    assert trainer.train(recipe, *keys) == 0
    assert "at step 2 (exact)" in capsys.readouterr().out
    runs = tmp_path / "runs"
    trainer.assert_same_checkpoint(runs / "tiny/checkpoints/step-00000003", runs / "straight/checkpoints/step-00000003")
    last = [record for record in trainer.metrics(runs / "tiny") if record["kind"] == "eval"][-1]
    assert {"box_ap", "mask_ap"} <= last.keys()
    logged = next(record for record in trainer.stable_metrics(runs / "tiny") if record["kind"] == "train")
    assert {f"loss_{part}_{n}" for part in ("classifier", "box_reg", "mask") for n in (1, 2, 3)} <= logged.keys()
    model = detect.load(runs / "tiny/export")
    with torch.no_grad():
        found = model([torch.rand(3, 40, 50)])[0]
    assert len(found["boxes"]) == 5 and found["masks"].shape == (5, 1, 40, 50)


@pytest.mark.large
@pytest.mark.parametrize("head", HEADS)
def test_it_learns_a_square(head):
    """One image with a bright square: after training the best box and its mask are those of the square."""
    model = built(head, classes=2, kwargs={**SMALL, "box_score_thresh": 0.05, "box_batch_size_per_image": 64})
    torch.manual_seed(1)
    image = 0.1 * torch.rand(3, 64, 64)
    image[:, 20:44, 12:40] += 0.8
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 20:44, 12:40] = 1
    box = torch.tensor([[12.0, 20, 40, 44]])
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": masks}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    history = []
    for _ in range(60):
        losses = model([image, image.flip(2)], [target, flipped(target, 64)])
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 3
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert found["labels"][0] == 1 and found["scores"][0] > 0.5
    assert (found["boxes"][0] - box[0]).abs().max() < 3
    covered = found["masks"][0, 0] > 0.5
    assert (covered & (masks[0] > 0)).sum() > 0.8 * (covered | (masks[0] > 0)).sum()


def flipped(target, width):
    left, top, right, bottom = target["boxes"].T
    boxes = torch.stack([width - right, top, width - left, bottom], 1)
    return {**target, "boxes": boxes, "masks": target["masks"].flip(2)}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("format", ["onnx", "torchscript-trace"])
def test_export_for_one_image(tmp_path, head, format):
    if missing := formats()[format].missing():
        pytest.skip(f"needs {', '.join(missing)}")
    model = OneImageDetector(built(head).eval())
    report = export(model, tmp_path / "model", format, size=(64, 80))
    images = torch.rand(1, 3, 64, 80)
    found, expected = load_export(report.path)(images), model(images)
    assert found.keys() == expected.keys() and len(found["boxes"]) == 5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)


def in_mmdetection(detector, head):
    """The weights of a detector with NAT as mmdetection names and scales them, those of NAT as its authors do."""
    own = detector.state_dict()
    state = timm.create_model("nat_atto", num_classes=2).state_dict()
    prefix = "backbone.body.body."
    state |= {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
    published = to_published("nat_atto", state)
    state = {f"backbone.{name}": t for name, t in published.items() if not name.startswith(("norm.", "head."))}
    for stage in range(4):
        state |= {f"backbone.norm{stage}.{p}": own[f"backbone.body.norms.{stage}.{p}"] for p in ("weight", "bias")}
    for level in range(4):
        for theirs, ours in (("lateral_convs", "inner_blocks"), ("fpn_convs", "layer_blocks")):
            for p in ("weight", "bias"):
                state[f"neck.{theirs}.{level}.conv.{p}"] = own[f"backbone.fpn.{ours}.{level}.0.{p}"]
    for theirs, ours in (("rpn_conv", "conv.0.0"), ("rpn_cls", "cls_logits"), ("rpn_reg", "bbox_pred")):
        state |= {f"rpn_head.{theirs}.{p}": own[f"rpn.head.{ours}.{p}"] for p in ("weight", "bias")}
    for number in range(3):
        ours, box, mask = f"roi_heads.stages.{number}", f"roi_head.bbox_head.{number}", f"roi_head.mask_head.{number}"
        fully = {"fc6": 0, "fc7": 1} if head == "linear" else {"5": 0}
        for p in ("weight", "bias"):
            state |= {f"{box}.shared_fcs.{n}.{p}": own[f"{ours}.box_head.{layer}.{p}"] for layer, n in fully.items()}
            scores = own[f"{ours}.box_predictor.cls_score.{p}"]
            state[f"{box}.fc_cls.{p}"] = torch.cat([scores[1:], scores[:1]])
            boxes = own[f"{ours}.box_predictor.bbox_pred.{p}"]
            boxes = boxes[4:] if head == "convolutions" else boxes
            if number == 2:  # mmdetection's deltas are multiplied by 0.033 and 0.067, ours divided by 30 and 15
                boxes = boxes.clone()
                for first, factor in ((0, 30 * 0.033), (1, 30 * 0.033), (2, 15 * 0.067), (3, 15 * 0.067)):
                    boxes[first::4] /= factor
            state[f"{box}.fc_reg.{p}"] = boxes
            state[f"{mask}.upsample.{p}"] = own[f"{ours}.mask_predictor.conv5_mask.{p}"]
            state[f"{mask}.conv_logits.{p}"] = own[f"{ours}.mask_predictor.mask_fcn_logits.{p}"][1:]
            state |= {f"{mask}.convs.{n}.conv.{p}": own[f"{ours}.mask_head.{n}.0.{p}"] for n in range(4)}
        if head == "convolutions":
            state |= {f"{box}.shared_convs.{n}.conv.weight": own[f"{ours}.box_head.{n}.0.weight"] for n in range(4)}
            for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                state |= {f"{box}.shared_convs.{n}.bn.{p}": own[f"{ours}.box_head.{n}.1.{p}"] for n in range(4)}
    return state


@pytest.mark.parametrize("head", HEADS)
def test_weights_of_mmdetection_give_the_same_detections(head):
    detector, other = built(head, name="nat_atto").eval(), built(head, name="nat_atto").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.01 * torch.randn(tensor.shape, generator=generator)
                tensor += noise.abs() if "running_var" in name else noise
        for one in detector.roi_heads.stages:  # mmdetection has no box and no mask of the background
            if head == "convolutions":
                one.box_predictor.bbox_pred.weight[:4] = one.box_predictor.bbox_pred.bias[:4] = 0
            one.mask_predictor.mask_fcn_logits.weight[:1] = one.mask_predictor.mask_fcn_logits.bias[:1] = 0
    state = in_mmdetection(detector, head)
    other.load_published(state)
    for name, tensor in detector.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    images = [torch.rand(3, 64, 90)]
    with torch.no_grad():
        (found,), (expected,) = other(images), detector(images)
    assert len(found["boxes"]) == 5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"has 1 weights that the model does not have: roi_head.bbox_head.3.fc_cls"):
        other.load_published(state | {"roi_head.bbox_head.3.fc_cls.weight": torch.zeros(1)})
