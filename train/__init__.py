"""The trainer: one engine for every task, run as `tessel train RECIPE key=value ...`.

Layers, from bottom to top: `recipe` (what to train), `distributed` (processes), `openmmlab` (adapters), `data`
(sources, order, loading), `optim` (optimizer, schedule, gradients, moving average), `run` (run directory, checkpoints,
logs), `tasks` (classify, segment, detect), `engine` and `evaluation` (the loop), `report`, `trainer` (a whole run), and
the commands `__main__`, `evaluate` and `check`. tests/test_layout.py checks that no layer imports a higher one.

`register_task` and `register_source` add a task or a data source from outside this package.
"""

from importlib.metadata import entry_points

from . import tasks as tasks  # registers the tasks
from .data import sources as sources  # registers the data sources
from .recipe.registry import Metric, SourceSpec, TaskSpec, register_source, register_task

for plugin in entry_points(group="tessel.plugins"):
    plugin.load()

__all__ = ["Metric", "SourceSpec", "TaskSpec", "register_source", "register_task"]
