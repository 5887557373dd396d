"""Panoptic segmentation as a task of the trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...distributed.world import World
from ...recipe.schema import Recipe
from ..detect.options import DetectData
from ..detect.task import DetectTask
from ..export import export_model
from .metrics import PanopticMetrics
from .model import build
from .options import Panoptic


class PanopticTask(DetectTask):
    """Segments without overlap: objects of thing classes, and one segment for each stuff class."""

    recipe: Recipe[Panoptic, DetectData]  # type: ignore[assignment]

    def __init__(self, recipe: Recipe[Panoptic, DetectData], world: World):
        super().__init__(recipe, world)  # type: ignore[arg-type]
        self.things: list[bool] = self.val.things

    def build_model(self) -> nn.Module:
        task, data = self.recipe.task, self.recipe.data
        parts = {"dense": task.dense, "size": data.size, "things": self.things}
        return build(self.recipe.model, task.detect, task.panoptic, **parts)

    def metrics(self, *, keep: bool = False) -> PanopticMetrics:
        return PanopticMetrics(self)

    def export(self, model: nn.Module, path: Path, state: Mapping[str, Any]) -> None:
        recipe = self.recipe
        sections = {"dense": recipe.task.dense, "detect": recipe.task.detect, "options": recipe.task.panoptic}
        facts: dict[str, Any] = {"size": recipe.data.size, "classes": self.classes, "things": self.things}
        facts["background"] = recipe.data.background
        export_model(path, state, task="panoptic", model=recipe.model, sections=sections, **facts)
