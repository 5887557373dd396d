"""Mask classification: the loss of transformers, matching of all layers together, initial weights, inference."""

import copy
import math

import pytest
import recipe_runner
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from tessel.train.errors import UserError
from tessel.train.heads import library as heads_library
from tessel.train.heads.library import parse_options
from tessel.train.heads.mask_classifier import MaskClassifier, MaskOutputs, mask2former_config, mask2former_parts
from tessel.train.heads.mask_inference import semantic_scores
from tessel.train.heads.mask_loss import MaskLoss, MaskTarget, at_shared_points, modeling
from tessel.train.heads.mask_options import Mask2FormerOptions
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.segment.mask_head import semantic_target
from tessel.train.tasks.segment.model import build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

NARROW = recipe_runner.NARROW_MASK2FORMER
CLASSES = 4


def options(**more):
    return Mask2FormerOptions(**{**NARROW, **more})


def outputs(layers, *, images=2, queries=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.randn(images, queries, CLASSES + 1, generator=generator) for _ in range(layers)]
    masks = [3 * torch.randn(images, queries, 6, 7, generator=generator) for _ in range(layers)]
    return MaskOutputs([one.requires_grad_() for one in classes], [one.requires_grad_() for one in masks])


def targets(*counts, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        MaskTarget(
            torch.randint(CLASSES, (count,), generator=generator),
            F.interpolate(torch.rand(count, 1, 3, 4, generator=generator), size=(24, 28))[:, 0] > 0.5,
        )
        for count in counts
    ]


def segmenter(**head):
    config = SegmentOptions(decode_head={"type": "Mask2Former", **NARROW, **head})
    names = [f"class {number}" for number in range(CLASSES)]
    return build_segmenter(Model(name="test_convnext"), config, dense=Dense(), classes=names)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (1, 0), (12, 3)])
def test_one_layer_has_the_loss_of_transformers(counts, monkeypatch):
    """At the same points: those of the matching are drawn in the same order, those of the losses are a grid."""
    grid = torch.cartesian_prod(torch.linspace(0, 1, 9), torch.linspace(0, 1, 8))
    sampler = "sample_points_using_uncertainty"
    monkeypatch.setattr(modeling().Mask2FormerLoss, sampler, lambda self, masks, *rest: grid.repeat(len(masks), 1, 1))
    found, wanted, chosen = outputs(1), targets(*counts), options()
    torch.manual_seed(5)
    ours = MaskLoss(chosen, CLASSES)(found, wanted)
    weights = {"loss_cross_entropy": chosen.class_weight, "loss_mask": chosen.mask_weight}
    weights["loss_dice"] = chosen.dice_weight
    criterion = modeling().Mask2FormerLoss(mask2former_config(chosen, CLASSES), weights)
    torch.manual_seed(5)
    theirs = criterion(
        found.masks[0], found.classes[0], [one.masks.float() for one in wanted], [one.labels for one in wanted]
    )
    assert ours["loss_class"].item() == pytest.approx(2 * theirs["loss_cross_entropy"].item(), rel=1e-5)
    for name in ("loss_mask", "loss_dice"):
        assert ours[name].item() == pytest.approx(5 * theirs[name].item(), rel=1e-5), name
    assert counts == (0, 0) or ours["loss_mask"] > 0


def test_layers_are_matched_each_by_its_own_costs():
    loss, found, wanted = MaskLoss(options(), CLASSES), outputs(3), targets(4, 2)
    torch.manual_seed(0)
    matches = loss.match(found, wanted)
    torch.manual_seed(0)
    costs = [loss.costs(found, image, target) for image, target in enumerate(wanted)]
    assert [len(layer) for layer in matches] == [2, 2, 2]
    for layer, images in enumerate(matches):
        for image, (queries, objects) in enumerate(images):
            best = linear_sum_assignment(costs[image][layer].detach().numpy())
            assert objects.tolist() == list(range(len(wanted[image].labels)))
            assert {*zip(queries.tolist(), objects.tolist(), strict=True)} == {*zip(*map(list, best), strict=True)}
    # the layers differ, so that equal matches would be a mistake
    assert any(not torch.equal(matches[0][0][0], other[0][0]) for other in matches[1:])


def test_costs_of_the_matching_are_those_of_transformers(monkeypatch):
    """Also for masks and objects that are sampled between 0 and 1, and for large logits."""
    chosen, found, (wanted,) = options(), outputs(2), targets(4)
    with torch.no_grad():
        found.masks[1].mul_(30)
    seen = []
    record = lambda cost: seen.append(cost) or linear_sum_assignment(cost)  # noqa: E731
    monkeypatch.setattr(modeling(), "linear_sum_assignment", record)
    matcher = modeling().Mask2FormerLoss(mask2former_config(chosen, CLASSES), {}).matcher
    for masks, classes in zip(found.masks, found.classes, strict=True):
        torch.manual_seed(3)
        matcher(masks[:1], classes[:1], [wanted.masks], [wanted.labels])
    torch.manual_seed(3)
    ours = MaskLoss(chosen, CLASSES).costs(found, 0, wanted)
    torch.testing.assert_close(ours, torch.stack(seen), rtol=1e-4, atol=1e-4)


def test_masks_at_shared_points_are_those_of_transformers():
    masks = torch.randn(5, 7, 4)
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.999]])
    points = torch.cat([torch.rand(200, 2), corners])
    wanted = modeling().sample_point(masks[None], points[None], align_corners=False)[0]
    torch.testing.assert_close(at_shared_points(masks, points), wanted, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_sum_over_layers():
    loss, wanted = MaskLoss(options(), CLASSES), targets(3, 2)
    one = outputs(1)
    three = MaskOutputs(one.classes * 3, one.masks * 3)
    for name in ("loss_class", "loss_mask", "loss_dice"):
        torch.manual_seed(0)
        single = loss(one, wanted)[name].item()
        torch.manual_seed(0)
        # points differ from layer to layer
        assert loss(three, wanted)[name].item() == pytest.approx(3 * single, rel=1e-5 if name == "loss_class" else 0.2)


def test_a_better_prediction_has_a_lower_loss_and_gradients_point_to_it():
    wanted = targets(2, 3)
    loss = MaskLoss(options(train_num_points=512), CLASSES)
    right = outputs(1)
    with torch.no_grad():
        for image, target in enumerate(wanted):
            small = F.interpolate(target.masks[None].float(), size=(6, 7))[0]
            right.masks[0][image, : len(small)] = 20 * (small - 0.5)
            right.classes[0][image] = F.one_hot(torch.tensor(CLASSES), CLASSES + 1) * 20.0
            right.classes[0][image, : len(small)] = F.one_hot(target.labels, CLASSES + 1) * 20.0
    good, bad = (sum(loss(one, wanted).values()) for one in (right, outputs(1)))
    assert good < 0.7 * bad
    bad.backward()


def test_half_precision_is_lifted():
    found = outputs(2)
    half = MaskOutputs([one.bfloat16() for one in found.classes], [one.bfloat16() for one in found.masks])
    with torch.autocast("cpu", torch.bfloat16):
        values = MaskLoss(options(), CLASSES)(half, targets(2, 1))
    assert all(value.dtype == torch.float32 and value.isfinite() for value in values.values())


def test_a_pixel_decoder_without_layers_has_no_weight_that_is_not_trained():
    """Such a weight has no state in the optimizer, which then cannot be resumed."""
    chosen = options(encoder_layers=0)
    parts = mask2former_parts(chosen, CLASSES, [8, 16, 24, 32], [4, 8, 16, 32])
    model = MaskClassifier(*parts, width=chosen.hidden_dim, classes=CLASSES)
    maps = [torch.randn(2, width, 8 // 2**level, 8 // 2**level) for level, width in enumerate((8, 16, 24, 32))]
    sum(MaskLoss(chosen, CLASSES)(model(maps), targets(2, 1)).values()).backward()
    idle = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert idle == {"pixel_decoder.level_embed"} and not parts[0].level_embed.requires_grad
    assert mask2former_parts(options(), CLASSES, [8, 16, 24, 32], [4, 8, 16, 32])[0].level_embed.requires_grad


def test_initial_weights_are_those_of_the_published_code():
    chosen = Mask2FormerOptions(encoder_layers=1, decoder_layers=4)
    parts = mask2former_parts(chosen, CLASSES, [48, 96, 192, 384], [4, 8, 16, 32])
    model = MaskClassifier(*parts, width=chosen.hidden_dim, classes=CLASSES)
    state = model.state_dict()
    xavier = {
        "pixel_decoder.input_projections.0.0.weight": 2 / (384 + 256),
        "pixel_decoder.encoder.layers.0.fc1.weight": 2 / (256 + 1024),
        "pixel_decoder.encoder.layers.0.self_attn.value_proj.weight": 2 / 512,
        "decoder.decoder.layers.0.self_attn.q_proj.weight": 2 / 512,
        "decoder.decoder.layers.0.fc1.weight": 2 / (256 + 2048),
        "decoder.decoder.layers.0.cross_attn.in_proj_weight": 2 / (256 + 768),
        # uniform by the fan in: c2_xavier_fill, and torch's own
        "pixel_decoder.mask_projection.weight": 1 / 256,
        "pixel_decoder.adapter_1.0.weight": 1 / 48,
        "pixel_decoder.layer_1.0.weight": 1 / (256 * 9),
        "class_predictor.weight": 1 / (3 * 256),
        "decoder.decoder.mask_predictor.mask_embedder.0.0.weight": 1 / (3 * 256),
        "decoder.queries_features.weight": 1.0,
        "pixel_decoder.level_embed": 1.0,
    }
    for name, variance in xavier.items():
        assert state[name].std().item() == pytest.approx(math.sqrt(variance), rel=0.06), name
    assert not state["pixel_decoder.encoder.layers.0.self_attn.sampling_offsets.weight"].any()
    assert state["pixel_decoder.encoder.layers.0.self_attn.sampling_offsets.bias"].abs().max() == 4  # four points
    assert model.no_weight_decay() == {
        "pixel_decoder.level_embed",
        *(f"decoder.{name}.weight" for name in ("queries_embedder", "queries_features", "level_embed")),
    }


def test_the_segmenter_trains_every_weight_and_predicts_at_any_size():
    torch.manual_seed(0)
    model = segmenter()
    images, masks = torch.randn(2, 3, 40, 56), torch.randint(CLASSES, (2, 40, 56))
    for labels in (masks, torch.full_like(masks, 255)):  # no labelled pixel: an image without objects
        losses = model(images, labels)
        assert set(losses) == {f"decode.loss_{name}" for name in ("class", "mask", "dice")}
        sum(losses.values()).backward()
        assert not [name for name, weight in model.named_parameters() if weight.grad is None]
        model.zero_grad()
    with torch.inference_mode():  # tensors that the library keeps from here must not stop the next training step
        scores = model.eval()(torch.randn(1, 3, 33, 47))
    assert scores.shape == (1, CLASSES, 33, 47) and scores.min() >= 0
    sum(model.train()(images, masks).values()).backward()
    assert "decode_head.decoder.queries_embedder.weight" in model.no_weight_decay()
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    assert not [name for name in model.state_dict() if "criterion" in name]


def test_scores_are_the_sum_over_queries():
    found = outputs(2)
    scores = semantic_scores(found, (12, 14))
    chosen, masks = found.classes[1].softmax(-1), F.interpolate(found.masks[1], size=(12, 14), mode="bilinear")
    expected = sum(chosen[:, q, :-1, None, None] * masks[:, q, None].sigmoid() for q in range(10))
    torch.testing.assert_close(scores, expected)


def test_classes_of_a_mask_are_its_objects():
    mask = torch.tensor([[3, 3, 255], [0, 255, 3]])
    labels, masks = semantic_target(mask)
    assert labels.tolist() == [0, 3] and masks.int().sum((1, 2)).tolist() == [1, 3]


@pytest.mark.parametrize(
    "head, message",
    [
        ({"queries": 3}, r"task.segment.decode_head has no option queries; it takes class_weight, decoder_layers"),
        ({"num_queries": 0}, r"task.segment.decode_head: num_queries=0: Input should be greater than 0"),
        ({"feature_size": 72}, "feature_size=72: Input should be a multiple of 32"),
        ({"in_index": [0, 1]}, "has no option in_index"),
    ],
)
def test_errors_name_the_option(head, message):
    with pytest.raises(UserError, match=message):
        segmenter(**head)


def test_class_weights_are_refused():
    config = SegmentOptions(decode_head={"type": "Mask2Former"}, class_weight={"a": 0.5})
    with pytest.raises(UserError, match="class_weight has no effect with task.segment.decode_head.type=Mask2Former"):
        build_segmenter(Model(name="test_convnext"), config, dense=Dense(), classes=["a", "b"])


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(heads_library, "import_module", missing)
    with pytest.raises(UserError, match=r"No module named .* pip install 'tessel\[transformers\]'"):
        segmenter()


def test_options_are_read_from_lists_and_integers():
    assert parse_options(Mask2FormerOptions, {"class_weight": 1}, "key").class_weight == 1.0
