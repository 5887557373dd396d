"""Segmenters and detectors with published weights, built by the recipe of their training without its data set."""

from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints import fetch_weight, find_dense_weight, read_state
from ..train.errors import UserError
from ..train.evaluation import without_initial_weights
from ..train.recipe.load import PACKAGED, load_recipe
from ..train.recipe.schema import Recipe


def is_recipe(name: str) -> bool:
    """Whether a packaged recipe has this name, such as "ade20k/nat_tiny_upernet"."""
    return "/" in name and (PACKAGED / f"{name}.yaml").is_file()


def build_published(name: str, weights: str | Path | None, *, pretrained: bool = True) -> tuple[Recipe, nn.Module]:
    """The recipe `name`, and its segmenter or detector with published weights, in evaluation mode on the CPU.

    weights: a file of them; by default the one that the list of published weights has for the recipe. Without
    `pretrained` and `weights`, they are random. Raises UserError if there is no such file, or it does not fit.
    """
    recipe = without_initial_weights(load_recipe(name))
    if (recipe.task.kind, recipe.data.source) not in BUILDERS:
        raise UserError(f"{name} is a recipe with task.kind={recipe.task.kind}; give the name of its model or a run")
    file, state_key = weights, ""
    if weights is None and pretrained:  # before the model is built, which takes longer
        file, state_key = fetch_published(name)
    model: Any = BUILDERS[recipe.task.kind, recipe.data.source](recipe)
    if file is None:
        return recipe, model.eval()
    try:
        model.load_published(read_state(file, state_key=state_key))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} does not fit the model of {name}: {error}") from error
    return recipe, model.eval()


def fetch_published(name: str) -> tuple[Path, str]:
    """The file of the published weights of the recipe `name`, and the entry of the file that holds them.

    It is downloaded on first use. Raises UserError if none are listed, or the download fails.
    """
    try:
        weight = find_dense_weight(name)
        return fetch_weight(weight), weight.state_key
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _ade20k_segmenter(recipe: Recipe) -> nn.Module:
    from ..train.data.segmentation import published_classes
    from ..train.tasks.segment.model import build_segmenter

    facts = published_classes("ade20k")
    model = build_segmenter(recipe.model, recipe.task.segment, dense=recipe.task.dense, classes=facts["classes"])
    model.classes, model.palette = facts["classes"], facts["palette"]
    return model


def _coco_detector(recipe: Recipe) -> nn.Module:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights as Reference

    from ..train.tasks.detect.detectors import build_detector

    # torchvision lists the 91 numbers of categories, of which COCO uses 80 in this order
    unused = ("__background__", "N/A")
    classes = [category for category in Reference.COCO_V1.value.meta["categories"] if category not in unused]
    task, size = recipe.task, recipe.data.size
    model: Any = build_detector(recipe.model, task.detect, dense=task.dense, size=size, classes=len(classes))
    model.classes = classes
    return model


BUILDERS = {("segment", "ade20k"): _ade20k_segmenter, ("detect", "coco"): _coco_detector}
