"""PLACEHOLDER train/tasks/build.py"""

from ..distributed.world import World
from ..recipe.schema import Recipe
from .base import Task


def build_task(recipe: Recipe, world: World) -> Task:
    """The task that `task.kind` names; only its own libraries are loaded."""
    if recipe.task.kind == "classify":
        from .classify.task import ClassifyTask

        return ClassifyTask(recipe, world)
    if recipe.task.kind == "segment":
        from .segment.task import SegmentTask

        return SegmentTask(recipe, world)
    if recipe.task.kind == "detect":
        from .detect.task import DetectTask

        return DetectTask(recipe, world)
    raise AssertionError(recipe.task.kind)
