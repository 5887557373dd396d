"""The keys of a recipe for panoptic segmentation."""

from collections.abc import Iterator

from pydantic.dataclasses import dataclass

from ...recipe.schema import STRICT, Dense, Probability, Recipe, Task
from ..detect.options import DetectData, DetectOptions
from ..detect.options import conflicts as detect_conflicts


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PanopticOptions:
    min_score: Probability = 0.8
    """a query below this class probability gives no segment"""
    min_overlap: Probability = 0.8
    """a segment is left out if other segments cover more than the rest of its mask"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Panoptic(Task):
    kind: str = "panoptic"
    """the task"""
    dense: Dense = Dense()
    detect: DetectOptions = DetectOptions(detector="mask2former")
    panoptic: PanopticOptions = PanopticOptions()


def conflicts(recipe: Recipe[Panoptic, DetectData]) -> Iterator[str]:
    """One sentence for each conflict between keys."""
    if (kind := recipe.task.detect.detector) not in ("mask2former", "pem"):
        yield f"task.kind=panoptic needs task.detect.detector=mask2former or pem, not {kind}"
    yield from detect_conflicts(recipe)  # type: ignore[arg-type]
