"""The tasks, one package each. Importing this package registers them; it imports no torch."""

from ..recipe.registry import register_task
from . import classify, detect, panoptic, segment

for spec in (classify.SPEC, classify.MULTI_LABEL, segment.SPEC, detect.SPEC, panoptic.SPEC):
    register_task(spec)
