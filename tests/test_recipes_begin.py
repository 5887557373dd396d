"""What each packaged recipe begins with exists: published weights with a link, or a run that another recipe makes."""

import re

import pytest
import timm

import tessel.zoo
from tessel.checkpoints import load_manifest
from tessel.train.recipe.load import PACKAGED, load_recipe

COLLECTIONS = ("imagenet", "ade20k", "coco")
RECIPES = sorted(f"{folder}/{path.stem}" for folder in COLLECTIONS for path in (PACKAGED / folder).glob("*.yaml"))
FAMILIES = {name: family for family in tessel.zoo.list_families() for name in family.variants}


def head(name):
    """The comment of a recipe as one line."""
    lines = (PACKAGED / f"{name}.yaml").read_text().splitlines()
    return " ".join(" ".join(line.removeprefix("#") for line in lines if line.startswith("#")).split())


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_begins_with_exists(name):
    model = load_recipe(name).model
    assert not (model.pretrained and model.init_from)
    if (model.init_from or "").startswith("local-dir:"):
        made = re.fullmatch(r"local-dir:runs/(\w+)/export", model.init_from)
        assert made and f"imagenet/{made[1]}" in RECIPES and load_recipe(f"imagenet/{made[1]}").run.name == made[1]
        assert model.name in (made[1], f"{made[1]}_384")
        assert f"weights: runs/{made[1]}/export, which a run of imagenet/{made[1]} writes" in head(name)
    elif weights := model.init_from or (model.name if model.pretrained else None):
        row = load_manifest()[weights if "." in weights else f"{weights}.{timm.get_pretrained_cfg(weights).tag}"]
        assert row.url.startswith("https://"), f"{row.name} cannot be downloaded: {row.why_no_url}"
        if not name.startswith("imagenet"):
            assert f"weights: the published weights {row.name}, which are downloaded by this name" in head(name)
    else:
        assert name.startswith("imagenet/")


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("imagenet/")])
def test_published_weights_are_used_where_they_exist(name):
    model = load_recipe(name).model
    architecture = model.name.partition(".")[0]
    fetched = any(row.url for row in load_manifest().values() if row.model == architecture)
    assert (model.init_from or "").startswith("local-dir:") != fetched
