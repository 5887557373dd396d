"""The packaged COCO recipes: the published settings, the schedule in steps, and one update of each."""

import math
import re

import pytest
import trainer

import tessel.zoo
from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.recipe.plan import plan

COCO = 117_266  # training images with objects
RECIPES = sorted(path.stem for path in (PACKAGED / "coco").glob("*.yaml"))
TORCHVISION = [name for name in RECIPES if name.startswith(("mask_rcnn", "cascade_mask_rcnn", "retinanet"))]
FAMILIES = {name: family for family in tessel.zoo.list_families() for name in family.variants}

# from the papers and their code, independently of the recipes, by model: peak lr, weight decay, and by schedule: drop
# path rate, published box AP and mask AP; a recipe without a row is not compared
MASK = {
    "agent_pvt_tiny": (2e-4, 1e-4, {"1x": (0.1, 41.4, 38.7)}),
    "agent_pvt_small": (2e-4, 1e-4, {"1x": (0.2, 44.5, 41.2)}),
    "agent_pvt_medium": (2e-4, 1e-4, {"1x": (0.1, 45.9, 42.0)}),
    "agent_pvt_large": (2e-4, 1e-4, {"1x": (0.2, 46.9, 42.8)}),
    "agent_swin_tiny": (1e-4, 0.05, {"1x": (0.1, 44.6, 40.7), "3x": (0.1, 47.3, 42.7)}),
    "agent_swin_small": (1e-4, 0.05, {"1x": (0.1, 47.2, 42.7), "3x": (0.1, 48.9, 43.8)}),
    "biformer_small": (1e-4, 0.05, {"1x": (0.2, 47.8, 43.2)}),
    "biformer_base": (1e-4, 0.05, {"1x": (0.3, 48.6, 43.7)}),
    "crossformer_small": (1e-4, 1e-4, {"1x": (0.2, 45.4, 41.4), "3x": (0.2, 48.7, 43.9)}),
    "crossformer_base": (1e-4, 1e-4, {"1x": (0.3, 47.2, 42.7), "3x": (0.3, 49.8, 44.5)}),
    "crossformer_pp_small": (1e-4, 1e-4, {"1x": (0.2, 46.4, 42.1)}),
    "crossformer_pp_base": (1e-4, 1e-4, {"1x": (0.3, 47.7, 43.2)}),
    "cswin_tiny": (1e-4, 0.05, {"3x": (0.2, 49.0, 43.6)}),
    "cswin_small": (1e-4, 0.05, {"3x": (0.4, 50.0, 44.5)}),
    "cswin_base": (1e-4, 0.05, {"3x": (0.5, 50.8, 44.9)}),
    "l2vit_tiny": (1e-4, 0.05, {"1x": (0.1, 45.5)}),
    "l2vit_small": (1e-4, 0.05, {"1x": (0.1, 47.2)}),
    "l2vit_base": (1e-4, 0.05, {"1x": (0.2, 47.5)}),
    "dinat_mini": (1e-4, 0.05, {"3x": (0.2, 47.2, 42.5)}),
    "dinat_tiny": (1e-4, 0.05, {"3x": (0.2, 48.6, 43.5)}),
    "dinat_small": (1e-4, 0.05, {"3x": (0.35, 49.3, 44.0)}),
    "dinat_s_tiny": (1e-4, 0.05, {"3x": (0.2, 46.6, 42.1)}),
    "dinat_s_small": (1e-4, 0.05, {"3x": (0.35, 48.6, 43.5)}),
    "litv2_small": (2e-4, 1e-4, {"1x": (0.2, 44.9, 40.8)}),
    "litv2_medium": (2e-4, 1e-4, {"1x": (0.2, 46.8, 42.3)}),
    "litv2_base": (2e-4, 1e-4, {"1x": (0.3, 47.3, 42.6)}),
    "nat_mini": (1e-4, 0.05, {"3x": (0.2, 46.5, 41.7)}),
    "nat_tiny": (1e-4, 0.05, {"3x": (0.2, 47.7, 42.6)}),
    "nat_small": (1e-4, 0.05, {"3x": (0.35, 48.4, 43.2)}),
    "s2aformer_mini": (1e-4, 0.05, {"1x": (0.0, 33.4, 31.7)}),
    "s2aformer_tiny": (1e-4, 0.05, {"1x": (0.0, 37.6, 35.4)}),
    "s2aformer_xsmall": (1e-4, 0.05, {"1x": (0.02, 38.4, 35.8)}),
    "s2aformer_small": (1e-4, 0.05, {"1x": (0.05, 41.0, 37.6)}),
    "s2aformer_medium": (1e-4, 0.05, {"1x": (0.15, 42.6, 39.3)}),
    "tessel_davit_tiny": (1e-4, 0.05, {"1x": (0.1, 45.0, 41.1), "3x": (0.2, 47.4, 42.9)}),
    "tessel_davit_small": (1e-4, 0.05, {"1x": (0.2, 47.7, 42.9), "3x": (0.3, 49.5, 44.3)}),
    "tessel_davit_base": (1e-4, 0.05, {"1x": (0.3, 48.2, 43.3), "3x": (0.4, 49.9, 44.6)}),
    "transnext_tiny": (1e-4, 0.05, {"1x": (0.4, 49.9, 44.6)}),
    "transnext_small": (1e-4, 0.05, {"1x": (0.6, 51.1, 45.5)}),
    "transnext_base": (1e-4, 0.05, {"1x": (0.7, 51.7, 45.9)}),
    "uniformer_xxsmall": (1e-4, 0.05, {"1x": (0.0, 42.8, 39.2)}),
    "uniformer_xsmall": (1e-4, 0.05, {"1x": (0.15, 44.6, 40.9)}),
    "uniformer_small": (1e-4, 0.05, {"1x": (0.2, 45.6, 41.6), "3x": (0.1, 48.2, 43.4)}),
    "uniformer_base": (1e-4, 0.05, {"1x": (0.3, 47.4, 43.1), "3x": (0.3, 50.3, 44.8)}),
}
CASCADE = {
    "agent_swin_base": (1e-4, 0.05, {"3x": (0.4, 52.6, 45.3)}),
    "agent_swin_small": (1e-4, 0.05, {"3x": (0.1, 52.6, 45.5)}),
    "agent_swin_tiny": (1e-4, 0.05, {"1x": (0.1, 49.2, 42.7), "3x": (0.1, 51.4, 44.5)}),
    "crossformer_small": (1e-4, 1e-4, {"3x": (0.2, 52.2, 45.2)}),
    "cswin_base": (1e-4, 0.05, {"3x": (0.5, 53.9, 46.4)}),
    "cswin_small": (1e-4, 0.05, {"3x": (0.4, 53.7, 46.4)}),
    "cswin_tiny": (1e-4, 0.05, {"3x": (0.2, 52.5, 45.3)}),
    "dinat_base": (7.5e-5, 0.05, {"3x": (0.6, 53.4, 46.2)}),
    "dinat_large": (7.5e-5, 0.05, {"3x": (0.6, 55.3, 47.8)}),
    "dinat_mini": (1e-4, 0.05, {"3x": (0.2, 51.2, 44.4)}),
    "dinat_s_base": (7.5e-5, 0.05, {"3x": (0.6, 52.6, 45.3)}),
    "dinat_s_large": (5e-5, 0.05, {"3x": (0.6, 54.8, 47.2)}),
    "dinat_s_small": (1e-4, 0.05, {"3x": (0.5, 52.3, 45.2)}),
    "dinat_s_tiny": (1e-4, 0.05, {"3x": (0.3, 51.0, 44.1)}),
    "dinat_small": (1e-4, 0.05, {"3x": (0.5, 52.9, 45.8)}),
    "dinat_tiny": (1e-4, 0.05, {"3x": (0.3, 52.2, 45.1)}),
    "nat_base": (1e-4, 0.05, {"3x": (0.5, 52.3, 45.1)}),
    "nat_mini": (1e-4, 0.05, {"3x": (0.2, 50.3, 43.6)}),
    "nat_small": (1e-4, 0.05, {"3x": (0.3, 52.0, 44.9)}),
    "nat_tiny": (1e-4, 0.05, {"3x": (0.3, 51.4, 44.5)}),
    "uniformer_base": (1e-4, 0.05, {"3x": (0.4, 53.8, 46.4)}),
    "uniformer_small": (1e-4, 0.05, {"3x": (0.2, 52.1, 45.2)}),
}
RETINA = {
    "agent_pvt_tiny": (1e-4, 1e-4, {"1x": (0.1, 40.3)}),
    "agent_pvt_small": (1e-4, 1e-4, {"1x": (0.2, 44.1)}),
    "agent_pvt_medium": (1e-4, 1e-4, {"1x": (0.1, 45.8)}),
    "agent_pvt_large": (1e-4, 1e-4, {"1x": (0.2, 46.8)}),
    "biformer_small": (1e-4, 1e-4, {"1x": (0.2, 45.9)}),
    "biformer_base": (1e-4, 1e-4, {"1x": (0.3, 47.1)}),
    "crossformer_small": (1e-4, 1e-4, {"1x": (0.2, 44.4)}),
    "crossformer_base": (1e-4, 1e-4, {"1x": (0.3, 46.2)}),
    "crossformer_pp_small": (1e-4, 1e-4, {"1x": (0.2, 45.1)}),
    "crossformer_pp_base": (1e-4, 1e-4, {"1x": (0.3, 46.6)}),
    "l2vit_tiny": (1e-4, 0.05, {"1x": (0.1, 44.1)}),
    "l2vit_small": (1e-4, 0.05, {"1x": (0.1, 46.2)}),
    "l2vit_base": (1e-4, 0.05, {"1x": (0.2, 46.5)}),
    "litv2_small": (1e-4, 1e-4, {"1x": (0.2, 44.0)}),
    "litv2_medium": (1e-4, 1e-4, {"1x": (0.2, 46.0)}),
    "litv2_base": (1e-4, 1e-4, {"1x": (0.3, 46.7)}),
    "s2aformer_mini": (1e-4, 0.05, {"1x": (0.0, 33.4)}),
    "s2aformer_tiny": (1e-4, 0.05, {"1x": (0.0, 36.7)}),
    "s2aformer_xsmall": (1e-4, 0.05, {"1x": (0.02, 37.9)}),
    "s2aformer_small": (1e-4, 0.05, {"1x": (0.05, 40.0)}),
    "s2aformer_medium": (1e-4, 0.05, {"1x": (0.15, 41.7)}),
    "tessel_davit_tiny": (1e-4, 0.05, {"1x": (0.1, 44.0), "3x": (0.2, 46.5)}),
    "tessel_davit_small": (1e-4, 0.05, {"1x": (0.2, 46.0), "3x": (0.3, 48.2)}),
    "tessel_davit_base": (1e-4, 0.05, {"1x": (0.3, 46.7), "3x": (0.4, 48.7)}),
}
FACTS = {
    f"{detector}_{schedule}_{model}": (detector, model, schedule, lr, decay, *row)
    for detector, table in (("mask_rcnn", MASK), ("cascade_mask_rcnn", CASCADE), ("retinanet", RETINA))
    for model, (lr, decay, rows) in table.items()
    for schedule, row in rows.items()
}


def architecture(name):
    return load_recipe(f"coco/{name}").model.name.partition(".")[0]


def family(name):
    """The first model of the family, as its name."""
    model = architecture(name)
    return next(iter(FAMILIES[model].variants)) if model in FAMILIES else model


# for the default suite, one recipe of each family with a detector of torchvision, and a cascade
FEW = [*{family(name): name for name in TORCHVISION}.values(), "cascade_mask_rcnn_3x_nat_tiny"]


def comments(name):
    lines = (PACKAGED / f"coco/{name}.yaml").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_itself_and_its_paper(name):
    recipe = load_recipe(f"coco/{name}")
    assert recipe.run.name == name and name.endswith(architecture(name))
    assert name.startswith(f"{recipe.task.detect.detector}_")
    assert recipe.model.pretrained != bool(recipe.model.init_from)
    assert f"coco/{name} data.root=" in comments(name)
    if architecture(name) in FAMILIES:
        paper = FAMILIES[architecture(name)].pretrained_cfg["paper_ids"].replace("arXiv:", "arXiv ")
        assert paper in comments(name)


@pytest.mark.parametrize("name", FACTS)
def test_recipe_has_the_published_settings(name):
    detector, model, schedule, lr, decay, drop_path, *results = FACTS[name]
    recipe = load_recipe(f"coco/{name}")
    planned = plan(recipe, samples=COCO, world_size=8)
    assert architecture(name) == model
    assert (recipe.task.detect.detector, recipe.model.drop_path_rate) == (detector, drop_path)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.data.batch) == (lr, decay, 16)
    assert (recipe.data.size, recipe.task.detect.max_size, recipe.data.aug.hflip) == (800, 1333, 0.5)
    assert (recipe.sched.epochs, recipe.sched.milestones) == {"1x": (12, (8, 11)), "3x": (36, (27, 33))}[schedule]
    assert planned.warmup == 500 and planned.micro_batch == 2 and planned.accumulate == 1
    assert all(re.search(rf"\b{re.escape(str(value))}\b", comments(name)) for value in results)


def test_the_recipe_of_mask2former_has_its_published_settings():
    recipe = load_recipe("coco/mask2former_cswin_tiny")
    planned, aug = plan(recipe, samples=COCO, world_size=8), recipe.data.aug
    assert (recipe.data.batch, planned.lr, recipe.optim.weight_decay, recipe.optim.clip) == (16, 1e-4, 0.05, 0.01)
    shares = [milestone / planned.steps for milestone in planned.milestones]
    assert shares == pytest.approx([327778 / 368750, 355092 / 368750], abs=1e-4)
    assert (aug.crop, aug.scale_jitter, aug.hflip, recipe.data.size) == (1024, (0.1, 2.0), 0.5, 800)
    assert recipe.optim.lr_factors == {r"^backbone\.": 0.1} and not recipe.task.detect.kwargs


def test_the_recipe_of_rtdetrv2_has_the_settings_of_dino():
    recipe = load_recipe("coco/rtdetrv2_transnext_tiny")
    detect, optim = recipe.task.detect, recipe.optim
    assert (recipe.sched.epochs, recipe.sched.milestones, recipe.data.batch) == (12, (11,), 16)
    assert (optim.lr, optim.weight_decay, optim.clip, optim.lr_factors) == (1e-4, 0.05, 0.1, {r"^backbone\.": 0.1})
    assert detect.min_size == tuple(range(480, 801, 32)) and detect.crop == (384, 600) and detect.empty
    assert detect.kwargs == {"num_queries": 900, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}


@pytest.mark.parametrize("name", TORCHVISION)
def test_recipe_follows_the_authors_code_in_decay_precision_and_batch_norm(name):
    recipe, model = load_recipe(f"coco/{name}"), architecture(name)
    retina = recipe.task.detect.detector == "retinanet"
    decays_all = model.startswith(
        ("agent_pvt", "crossformer", "l2vit", "tessel_davit", *(("biformer", "litv2") if retina else ()))
    )
    assert recipe.optim.decay_norms == decays_all
    assert recipe.parallel.sync_batch_norm != model.startswith("litv2")
    half = model.startswith(("biformer", "litv2", "s2aformer", "cswin", "nat", "dinat"))
    half |= model in ("transnext_base", "uniformer_small", "uniformer_base")
    half &= model != "dinat_large"
    assert (recipe.parallel.precision == "fp16") == half


@pytest.mark.parametrize("name", TORCHVISION)
def test_recipe_has_mmdetections_conventions_where_torchvision_lets_it(name):
    detect = load_recipe(f"coco/{name}").task.detect
    if detect.detector == "cascade_mask_rcnn":
        assert detect.roi_align == "mmdetection" and detect.box_head == "convolutions" and not detect.kwargs
        assert "four convolutions with batch norm" in " ".join(comments(name).replace("#", "").split())
    elif detect.detector == "mask_rcnn":
        assert detect.roi_align == "mmdetection" and detect.kwargs == {"rpn_post_nms_top_n_train": 1000}
        assert "The box losses are smooth L1 with beta 1/9; in mmdetection they are L1." in " ".join(
            comments(name).replace("#", "").split()
        )
    else:
        assert detect.loss_average == "batch" and detect.last_level == "mmdetection"
        assert detect.kwargs == {"detections_per_img": 100}
    assert "rounded to whole pixels" in " ".join(comments(name).replace("#", "").split())


@pytest.mark.parametrize("name", ["mask_rcnn_1x_litv2_small", "retinanet_3x_tessel_davit_base"])
def test_learning_rate_at_named_points(name):
    recipe = load_recipe(f"coco/{name}")
    planned = plan(recipe, samples=COCO, world_size=8)
    lr = trainer.learning_rate(recipe, planned)

    assert [lr(step) / planned.lr for step in (0, 250, 500)] == pytest.approx([1e-3, 0.5005, 1])
    for number, epoch in enumerate(recipe.sched.milestones or ()):
        step = round(epoch * COCO / 16)
        assert [lr(step - 1), lr(step)] == pytest.approx([planned.lr * 0.1**n for n in (number, number + 1)])
    assert planned.steps == math.ceil((recipe.sched.epochs or 0) * COCO / 16)


def one_step(name, tmp_path):
    """An update with two digit scenes of 64 px and the smallest model of the family."""
    model = architecture(name)
    variants = FAMILIES[model].variants if model in FAMILIES else ()
    smallest = next((variant for variant in variants if variant.endswith("_atto")), model)
    here = ["data.source=digit_scenes", "data.root=null", "data.size=64", "data.scenes=5", "data.batch=2"]
    short = ["data.workers=0", "sched.epochs=null", "sched.steps=2", "sched.milestones=[1]", "sched.warmup=0"]
    small = ["task.detect.min_size=null", "task.detect.channels=64", "parallel.precision=fp32", "run.device=cpu"]
    begin = [f"model.name={smallest}", "model.init_from=null", "model.pretrained=false", f"run.out={tmp_path}"]
    recipe = load_recipe(f"coco/{name}", [*here, *short, *small, *begin])
    _, moved = trainer.run_updates(recipe, 1)
    assert any(key.startswith("backbone.body") for key in moved)


@pytest.mark.parametrize("name", FEW)
def test_one_step_with_the_familys_smallest_model(name, tmp_path):
    one_step(name, tmp_path)
