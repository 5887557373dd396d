"""The packaged ADE20K recipes: the published figures, the schedule, and two steps of each."""

import dataclasses
import math
import re

import pytest
import scenery
import trainer

import tessel.zoo
from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.recipe.plan import plan
from tessel.train.tasks.segment.model import assemble

IMAGES = 20_210  # for training
RECIPES = sorted(path.stem for path in (PACKAGED / "ade20k").glob("*.yaml"))
FAMILIES = {name: family for family in tessel.zoo.list_families() for name in family.variants}

# written down a second time, from the fact sheets: head, steps, batch, lr, weight decay, drop path, published mIoU
FACTS = {
    "affnet_base_deeplabv3": ("ASPPHead", 63157, 16, 5e-4, 0.01, None, 38.4),
    "affnet_extra_tiny_deeplabv3": ("ASPPHead", 63157, 16, 5e-4, 0.01, None, 33.0),
    "affnet_tiny_deeplabv3": ("ASPPHead", 63157, 16, 5e-4, 0.01, None, 36.9),
    "biformer_base_fpn": ("FPNHead", 80000, 32, 2e-4, 1e-4, 0.3, 49.9),
    "biformer_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.4, 51.0),
    "biformer_small_fpn": ("FPNHead", 80000, 32, 2e-4, 1e-4, 0.15, 48.9),
    "biformer_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 49.8),
    "cswin_base_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.6, 49.9),
    "cswin_base_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.6, 51.1),
    "cswin_large_upernet_640": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.6, 53.4),
    "cswin_small_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.4, 49.2),
    "cswin_small_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.4, 50.4),
    "cswin_tiny_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.3, 48.2),
    "cswin_tiny_upernet": ("UPerHead", 160000, 16, 6e-5, 0.01, 0.3, 49.3),
    "litv2_base_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.3, 47.2),
    "litv2_medium_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.2, 45.7),
    "litv2_small_fpn": ("FPNHead", 80000, 16, 1e-4, 1e-4, 0.2, 44.3),
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
}
# published sizes of whole segmenters, in millions, without the auxiliary head where they are of inference
MILLIONS = {
    "litv2_base_fpn": 90,
    "litv2_medium_fpn": 52,
    "litv2_small_fpn": 31,
    "tessel_davit_base_upernet": 121,
    "tessel_davit_small_upernet": 81,
    "tessel_davit_tiny_upernet": 60,
    "transnext_tiny_upernet": 59,
}


def loaded(name, *overrides):
    return load_recipe(f"ade20k/{name}", overrides)


def test_every_published_row_has_its_recipe():
    assert set(RECIPES) == set(FACTS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_holds_the_published_figures(name):
    recipe, (head, steps, batch, lr, decay, drop_path, miou) = loaded(name), FACTS[name]
    segment, planned = recipe.task.segment, plan(recipe, samples=IMAGES, world_size=8)
    assert recipe.run.name == name and name.startswith(recipe.model.name)
    assert (segment.decode_head["type"], planned.steps, recipe.data.batch) == (head, steps, batch)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.model.drop_path_rate) == (lr, decay, drop_path)
    size = 640 if name.endswith("_640") else 512
    assert recipe.data.size == size and recipe.data.img_scale == (4 * size, size) and planned.micro_batch == batch // 8
    assert bool(segment.auxiliary_head) == (head == "UPerHead") and bool(segment.neck) == (head == "FPNHead")
    assert recipe.model.pretrained or recipe.model.init_from
    assert segment.test.mode == ("slide" if name.startswith("transnext") else "whole")
    text = "\n".join(line for line in (PACKAGED / f"ade20k/{name}.yaml").read_text().splitlines() if line[0] == "#")
    assert f" -m tessel.train ade20k/{name} data.root=ADE20K\n" in text
    assert f"mIoU {miou} % (published" in text and "not run so far" in " ".join(text.replace("\n#", " ").split())
    assert all(f"\n# {key}:" in text for key in ("command", "hardware", "time", "expected", "source"))
    paper = FAMILIES[recipe.model.name].cfg["paper_ids"].replace("arXiv:", "arXiv ")
    assert paper in text and re.search(r"arXiv \d{4}\.\d{5}", text)


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
    """The heads are narrowed, and keep their kind and their wiring."""
    atto = next(model for model in FAMILIES[loaded(name).model.name].variants if model.endswith("_atto"))
    narrow = ["task.segment.decode_head.channels=8", f"model.name={atto}"]
    narrow += ["task.segment.neck.out_channels=8"] if loaded(name).task.segment.neck else []
    narrow += ["task.segment.auxiliary_head.channels=8"] if loaded(name).task.segment.auxiliary_head else []
    _, moved = trainer.updated(loaded(name, *here(images, tmp_path), *narrow), 2)
    assert {key.partition(".")[0] for key in moved} >= {"backbone", "decode_head"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affnet_extra_tiny_deeplabv3", "biformer_small_fpn", "tessel_davit_tiny_upernet"])
def test_two_steps_with_the_model_itself(name, images, tmp_path):
    assert trainer.updated(loaded(name, *here(images, tmp_path)), 2)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MILLIONS)
def test_size_of_the_whole_segmenter(name):
    recipe, classes = loaded(name), [str(number) for number in range(150)]
    own = dataclasses.replace(recipe.model, pretrained=False)
    model = assemble(own, recipe.task.segment, dense=recipe.task.dense, classes=classes)
    counted = sum(weight.numel() for key, weight in model.named_parameters()) / 1e6
    assert counted == pytest.approx(MILLIONS[name], abs=1.5)
