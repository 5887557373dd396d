"""The packaged ADE20K recipes: the published settings, the schedule, and two steps of each."""

import dataclasses
import math
import re

import pytest
import recipe_runner
import scenery
import trainer

import tessel.zoo
from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.recipe.plan import plan
from tessel.train.tasks.segment.model import build_segmenter

IMAGES = 20_210  # for training
RECIPES = sorted(path.stem for path in (PACKAGED / "ade20k").glob("*.yaml") if not path.stem.startswith("panoptic_"))
FAMILIES = {name: family for family in tessel.zoo.list_families() for name in family.variants}

# from the papers and their code, independently of the recipes: head, steps, batch, lr, weight decay, drop path rate,
# published mIoU; a recipe without a row is not compared
FACTS = {
    "affnet_base_deeplabv3": ("ASPPHead", 63157, 16, 5e-4, 0.01, None, 38.4),
    "affnet_extra_tiny_deeplabv3": ("ASPPHead", 63157, 16, 5e-4, 0.01, None, 33.0),
    "affnet_tiny_deeplabv3": ("ASPPHead", 63157, 16, 5e-4, 0.01, None, 36.9),
    "agent_pvt_tiny_fpn": ("FPNHead", 40000, 16, 2e-4, 1e-4, 0.1, 40.18),
    "agent_pvt_small_fpn": ("FPNHead", 40000, 16, 2e-4, 1e-4, 0.1, 44.18),
    "agent_pvt_medium_fpn": ("FPNHead", 40000, 16, 2e-4, 1e-4, 0.2, 44.3),
    "agent_pvt_large_fpn": ("FPNHead", 40000, 16, 2e-4, 1e-4, 0.1, 46.52),
    "agent_swin_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 46.68),
    "agent_swin_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 48.08),
    "agent_swin_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.5, 48.73),
    "biformer_base_fpn": ("FPNHead", 80000, 32, 2e-4, 1e-4, 0.3, 49.9),
    "biformer_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.4, 51.0),
    "biformer_small_fpn": ("FPNHead", 80000, 32, 2e-4, 1e-4, 0.15, 48.9),
    "biformer_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 49.8),
    "crossformer_base_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.3, 48.0),
    "crossformer_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 49.7),
    "crossformer_large_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.5, 49.1),
    "crossformer_large_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.5, 50.4),
    "crossformer_pp_base_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.3, 48.6),
    "crossformer_pp_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 50.7),
    "crossformer_pp_small_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.2, 47.4),
    "crossformer_pp_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.2, 49.4),
    "crossformer_small_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.2, 46.4),
    "crossformer_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.2, 47.6),
    "cswin_base_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.6, 49.9),
    "cswin_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.6, 51.1),
    "cswin_large_upernet_640": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.6, 53.4),
    "cswin_small_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.4, 49.2),
    "cswin_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.4, 50.4),
    "cswin_tiny_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.3, 48.2),
    "cswin_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 49.3),
    "l2vit_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 49.2),
    "l2vit_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 48.7),
    "l2vit_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 46.2),
    "dinat_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.5, 49.6),
    "dinat_large_upernet_640": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 54.0),
    "dinat_mini_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.2, 45.8),
    "dinat_s_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 49.4),
    "dinat_s_large_upernet_640": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 53.4),
    "dinat_s_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 48.6),
    "dinat_s_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 46.0),
    "dinat_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.5, 48.9),
    "dinat_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 47.8),
    "litv2_base_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.3, 47.2),
    "litv2_medium_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.2, 45.7),
    "litv2_small_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.2, 44.3),
    "mask2former_transnext_base": ("Mask2Former", 160000, 16, 1e-4, 0.05, 0.6, 54.7),
    "mask2former_transnext_small": ("Mask2Former", 160000, 16, 1e-4, 0.05, 0.5, 54.1),
    "mask2former_transnext_tiny": ("Mask2Former", 160000, 16, 1e-4, 0.05, 0.3, 53.4),
    "nat_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.5, 48.5),
    "nat_mini_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.2, 45.1),
    "nat_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.5, 48.0),
    "nat_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 47.1),
    "s2aformer_medium_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.15, 43.7),
    "s2aformer_mini_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.0, 36.7),
    "s2aformer_small_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.05, 40.8),
    "s2aformer_tiny_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.0, 38.0),
    "s2aformer_xsmall_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.02, 39.2),
    "tessel_davit_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 49.4),
    "tessel_davit_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 48.8),
    "tessel_davit_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 46.3),
    "transnext_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.05, 0.7, 53.0),
    "transnext_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.05, 0.6, 52.2),
    "transnext_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.05, 0.4, 51.1),
    "uniformer_base_fpn": ("FPNHead", 80000, 32, 2e-4, 1e-4, 0.2, 47.0),
    "uniformer_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.4, 48.9),
    "uniformer_small_fpn": ("FPNHead", 80000, 32, 2e-4, 1e-4, 0.1, 46.3),
    "uniformer_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.25, 46.9),
    "uniformer_xsmall_fpn": ("FPNHead", 80000, 32, 2e-4, 1e-4, 0.1, 44.4),
    "uniformer_xxsmall_fpn": ("FPNHead", 80000, 32, 2e-4, 1e-4, 0.0, 42.3),
    "van_b0_fpn": ("FPNHead", 40000, 32, 2e-4, 1e-4, 0.2, 38.5),
    "van_b1_fpn": ("FPNHead", 40000, 32, 2e-4, 1e-4, 0.2, 42.9),
    "van_b2_fpn": ("FPNHead", 40000, 32, 2e-4, 1e-4, 0.2, 46.7),
    "van_b3_fpn": ("FPNHead", 40000, 32, 2e-4, 1e-4, 0.3, 48.1),
    "van_b0_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.1, 41.1),
    "van_b1_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.1, 44.9),
    "van_b2_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.1, 50.1),
    "van_b3_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 50.6),
    "van_b4_upernet": ("UPerHead", 160000, 32, 6e-5, 0.01, 0.4, 52.2),
    "van_b5_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.4, 53.9),
    "van_b6_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.5, 54.7),
}
# published numbers of parameters of whole segmenters, in millions
MILLIONS = {
    "litv2_base_fpn": 90,
    "litv2_medium_fpn": 52,
    "litv2_small_fpn": 31,
    "tessel_davit_base_upernet": 121,
    "tessel_davit_small_upernet": 81,
    "tessel_davit_tiny_upernet": 60,
    "transnext_tiny_upernet": 59,
    "van_b2_upernet": 57,
    "van_b3_upernet": 75,
}


def loaded(name, *overrides):
    return load_recipe(f"ade20k/{name}", overrides)


def comments(name):
    lines = (PACKAGED / f"ade20k/{name}.yaml").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def smallest(name):
    """The smallest model of the recipe's family."""
    model = loaded(name).model.name
    variants = FAMILIES[model].variants if model in FAMILIES else ()
    return next((variant for variant in variants if variant.endswith("_atto")), model)


@pytest.mark.parametrize("name", [*RECIPES, "panoptic_mask2former_transnext_tiny"])
def test_recipe_names_itself_and_its_paper(name):
    recipe = loaded(name)
    assert recipe.run.name == name and recipe.model.name in name
    assert recipe.model.pretrained or recipe.model.init_from
    assert f"ade20k/{name} data.root=" in comments(name)
    if recipe.model.name in FAMILIES:
        paper = FAMILIES[recipe.model.name].pretrained_cfg["paper_ids"].replace("arXiv:", "arXiv ")
        assert paper in comments(name)


@pytest.mark.parametrize("name", FACTS)
def test_recipe_has_the_published_settings(name):
    recipe, (head, steps, batch, lr, decay, drop_path, miou) = loaded(name), FACTS[name]
    segment, planned = recipe.task.segment, plan(recipe, samples=IMAGES, world_size=8)
    assert (segment.decode_head["type"], planned.steps, recipe.data.batch) == (head, steps, batch)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.model.drop_path_rate) == (lr, decay, drop_path)
    size = 640 if name.endswith("_640") else 512
    assert recipe.data.size == size and recipe.data.img_scale == (4 * size, size) and planned.micro_batch == batch // 8
    assert bool(segment.auxiliary_head) == (head == "UPerHead") and bool(segment.neck) == (head == "FPNHead")
    assert segment.test.mode == ("slide" if name.startswith("transnext") else "whole")
    assert re.search(rf"\b{re.escape(str(miou))}\b", comments(name))


def test_the_panoptic_recipe_has_mask2formers_settings():
    recipe = loaded("panoptic_mask2former_transnext_tiny")
    planned, detect = plan(recipe, samples=IMAGES, world_size=8), recipe.task.detect
    assert (planned.steps, recipe.data.batch, planned.lr, recipe.optim.clip) == (160000, 16, 1e-4, 0.01)
    assert recipe.data.aug.photometric and recipe.optim.lr_factors == {r"^backbone\.": 0.1}
    assert (
        recipe.optim.weight_decay == 0.05 and recipe.task.panoptic.min_score == recipe.task.panoptic.min_overlap == 0.8
    )
    assert detect.min_size == tuple(64 * step for step in range(5, 21)) and detect.max_size == 2560
    assert recipe.data.size == recipe.data.aug.crop == 640 and not detect.kwargs


@pytest.mark.parametrize(
    ("name", "batch", "lr", "min_lr", "share"),
    [
        ("mask2former_cswin_tiny", 16, 1e-4, 0, 1),
        ("mask2former_transnext_base", 16, 1e-4, 0, 0.75),
        ("pem_cswin_tiny", 32, 4e-4, 1e-6, 1),
    ],
)
def test_recipe_of_mask_classification_has_the_published_settings(name, batch, lr, min_lr, share):
    """share: of a crop that one class may cover at most; TransNeXt's authors limit it, Mask2Former and PEM do not."""
    recipe = loaded(name)
    aug, optim, sched = recipe.data.aug, recipe.optim, recipe.sched
    assert (plan(recipe, samples=IMAGES, world_size=8).steps, recipe.data.batch, optim.lr) == (160000, batch, lr)
    assert (aug.resize, aug.cat_max_ratio, aug.photometric, aug.hflip) == ((0.5, 2.0), share, True, 0.5)
    assert (optim.weight_decay, optim.clip, optim.lr_factors) == (0.05, 0.01, {r"^backbone\.": 0.1})
    assert (sched.warmup, sched.min_lr) == (0, min_lr) and recipe.task.segment.decode_head.keys() == {"type"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_follows_the_authors_code_in_loss_decay_and_batch_norm(name):
    recipe = loaded(name)
    assert recipe.task.segment.avg_non_ignore == name.startswith(("affnet", "mask2former", "pem"))
    decays_all = (
        ("l2vit", "tessel_davit")
        if "upernet" in name
        else ("agent", "biformer", "crossformer", "cswin", "litv2", "uniformer", "van")
    )
    assert recipe.optim.decay_norms == name.startswith(decays_all)
    assert recipe.parallel.sync_batch_norm != name.startswith(("l2vit", "tessel_davit"))
    assert recipe.task.dense.sync_batch_norm != name.startswith("litv2")


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rate_at_named_points(name):
    recipe = loaded(name)
    planned, sched = plan(recipe, samples=IMAGES, world_size=8), recipe.sched
    lr = trainer.learning_rate(recipe, planned)

    def expected(step):
        done = step / planned.steps
        share = (1 - done) ** (sched.decay_rate or 1) if sched.name == "poly" else (1 + math.cos(math.pi * done)) / 2
        return sched.min_lr + (planned.lr - sched.min_lr) * share

    if planned.warmup:
        assert lr(0) == pytest.approx(sched.warmup_lr) and lr(planned.warmup // 2) < 0.6 * planned.lr
    for step in (planned.warmup, planned.steps // 2, planned.steps - 1):
        assert lr(step) == pytest.approx(expected(step), rel=1e-6)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return scenery.ade20k(tmp_path_factory.mktemp("scenery"), train=4, val=1)


def here(images, tmp_path):
    short = ["sched.epochs=null", "sched.steps=2", "sched.warmup=0", "parallel.precision=fp32", "data.workers=0"]
    data = [f"data.root={images}", "data.size=64", "data.img_scale=[256, 64]", "data.batch=2", "data.micro_batch=null"]
    return [*short, *data, f"run.out={tmp_path}", "run.device=cpu", "model.pretrained=false", "model.init_from=null"]


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_with_the_familys_smallest_model(name, images, tmp_path):
    """The heads have fewer channels, but their type and inputs stay."""
    head = loaded(name).task.segment.decode_head["type"]
    narrow = {"Mask2Former": recipe_runner.NARROW_MASK2FORMER, "PEM": recipe_runner.NARROW_PEM}.get(
        head, {"channels": 8}
    )
    narrow = [f"task.segment.decode_head.{key}={value}" for key, value in narrow.items()]
    narrow += [f"model.name={smallest(name)}"]
    narrow += ["task.segment.neck.out_channels=8"] if loaded(name).task.segment.neck else []
    narrow += ["task.segment.auxiliary_head.channels=8"] if loaded(name).task.segment.auxiliary_head else []
    _, moved = trainer.run_updates(loaded(name, *here(images, tmp_path), *narrow), 2)
    assert {key.partition(".")[0] for key in moved} >= {"backbone", "decode_head"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affnet_extra_tiny_deeplabv3", "biformer_small_fpn", "tessel_davit_tiny_upernet"])
def test_two_steps_with_the_model_itself(name, images, tmp_path):
    assert trainer.run_updates(loaded(name, *here(images, tmp_path)), 2)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MILLIONS)
def test_size_of_the_whole_segmenter(name):
    recipe, classes = loaded(name), [str(number) for number in range(150)]
    own = dataclasses.replace(recipe.model, pretrained=False)
    model = build_segmenter(own, recipe.task.segment, dense=recipe.task.dense, classes=classes)
    counted = sum(weight.numel() for key, weight in model.named_parameters()) / 1e6
    assert counted == pytest.approx(MILLIONS[name], abs=1.5)
