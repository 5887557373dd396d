"""The registries of tasks and data sources, and the type of recipe that a pair of them takes.

A task is registered by one `TaskSpec`, a data source by one `SourceSpec`. Nothing else in the trainer lists them. The
built-in ones are registered when `tessel.train` is imported; other packages call `register_task` and `register_source`,
or name a module that does in the entry-point group `tessel.plugins`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pkgutil import resolve_name
from typing import Any

from pydantic.dataclasses import dataclass

from .schema import STRICT, Data, Key, PixelFormat, Recipe, Source, Task, keys


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that an evaluation yields: its key in metrics.jsonl, and its name in a report."""

    key: str
    name: str
    higher_is_better: bool = True

    def is_better(self, value: float, than: float | None) -> bool:
        return than is None or (value > than if self.higher_is_better else value < than)


@dataclasses.dataclass(frozen=True)
class Auto:
    """What `auto` means in a task; see `sizing`.

    batch, epochs: the lowest and highest `data.batch` and `sched.epochs`. keys: further keys that take `auto`, and
    functions of the recipe that choose their values.
    """

    batch: tuple[int, int] = (8, 128)
    epochs: tuple[int, int] = (10, 100)
    keys: Mapping[str, Callable[[Recipe], Any]] = dataclasses.field(default_factory=dict)


def no_conflicts(recipe: Recipe) -> Iterator[str]:
    """Default of `TaskSpec.conflicts`: the task has no rules beyond the types of its keys."""
    return iter(())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Everything the trainer must know of a task before its libraries are imported.

    Dotted names "package.module:attribute" are imported when they are first needed.
    """

    kind: str
    """value of `task.kind`"""
    summary: str
    """one line for --help"""
    options: type[Task]
    """section `task` of the recipe"""
    data: type[Data] = Data
    """section `data` without the keys of the source; `data.aug` holds the augmentation"""
    sample: str | Callable[[Any], str]
    """kind of sample that it reads, a key of `SourceSpec.datasets`; or a function of `options` that returns it"""
    task: str
    """dotted name of the class, called as task(recipe, world); see `tasks.base.Task`"""
    metric: Metric | None = None
    """primary metric, by which the best checkpoint is chosen; None: the task has no evaluation"""
    metric_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """names in a report of further metrics: key -> name"""
    conflicts: Callable[[Recipe], Iterator[str]] = no_conflicts
    """yields a sentence for each pair of keys that contradict each other"""
    load: str
    """dotted name of a function: path of an export -> model in evaluation mode on the CPU"""
    load_hint: str
    """Python code that loads an export at {path}, shown to the user"""
    predicts: bool = False
    """whether `tessel predict` knows the task"""
    any_channels: bool = False
    """whether it reads images of `model.in_chans` channels; the others read 3"""
    usage: str | Callable[[Any], str] | None = None
    """Python code for a report: loads the export in the folder {path} and predicts; or a function of the recipe that
    returns it"""
    report: str | None = None
    """dotted name of a module with the functions `headline` and `sections`; see report/dense.py"""
    eval_keys: tuple[str, ...] = ()
    """prefixes of `task` keys that `evaluate` accepts as overrides"""
    init_keys: tuple[str, ...] = ()
    """keys that name initial weights, beside model.pretrained and model.init_from; an evaluation clears them"""
    backbone_prefix: str | None = None
    """prefix of the backbone's weights, so that another model can start from them; None: all but the classifier"""
    auto: Auto = Auto()
    """what keys with the value auto stand for"""
    models_of_timm: bool = False
    """model.name is a model of timm or tessel: a misspelt one is told before torch is imported"""

    def sample_kind(self, options: Task) -> str:
        """The kind of sample that it reads with these options."""
        return self.sample(options) if callable(self.sample) else self.sample

    def usage_code(self, recipe: Recipe, path: str) -> str:
        """`usage` for the export at `path` of a run with this recipe."""
        code = self.usage(recipe) if callable(self.usage) else str(self.usage)
        return code.replace("{path}", path)

    def build(self, recipe: Recipe, world: Any) -> Any:
        """The task of a recipe."""
        return resolve_name(self.task)(recipe, world)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A data source: its keys, and the data sets it opens."""

    name: str
    """value of `data.source`"""
    summary: str
    """one line for --help"""
    options: type[Source] = Source
    """keys that it adds to the section `data`"""
    datasets: Mapping[str, Callable[[Any, str], Any]]
    """kind of sample -> function (section `data`, "train" or "val") -> map-style data set.

    Kinds: "labels" (image, class index), "label sets" (image, float32 [classes] of 0 and 1), "semantic masks" (image,
    uint8 mask; see `data.segmentation`), "boxes" and "instance masks" (image, target; see `data.detection`), "panoptic
    masks" (the same, with `things: list[bool]` by class; see `data.panoptic`); other packages may add kinds. A data set
    has `classes: list[str]` if its samples have classes. One that reads image files
    has `pixel_format: PixelFormat`, which `open_dataset` sets, and passes it to `data.image_io.read_image`.
    One of "labels" or "label sets" reads them by its attribute `decode`, by default `read_image`, which `data.decoder`
    replaces. For messages, `tessel check` and reports it may also have

    - `image_path(index) -> str`: the file of a sample
    - `targets`: the classes of all its objects, so that classes without a sample are found without reading images
    - `contents() -> list[np.ndarray]`: what distinguishes its samples from others besides the names and sizes of files,
      by default `targets`. A run that learned from other samples is not resumed
    - `problems(index) -> list[str]`: a sentence for each fault of a sample, where taking the sample would raise for the
      first one or for none
    - `palette`: a color (red, green, blue in 0..255) for each class

    If it cannot be opened, it raises UserError; `errors.FaultsError` lists several faults at once.
    """


TASKS: dict[str, TaskSpec] = {}
SOURCES: dict[str, SourceSpec] = {}


def register_task(spec: TaskSpec) -> TaskSpec:
    """Make `task.kind=<spec.kind>` available. Raises ValueError if the kind is taken."""
    return _register(TASKS, spec.kind, spec)


def register_source(spec: SourceSpec) -> SourceSpec:
    """Make `data.source=<spec.name>` available. Raises ValueError if the name is taken."""
    return _register(SOURCES, spec.name, spec)


def _register(registry: dict[str, Any], name: str, spec: Any) -> Any:
    if registry.get(name, spec) is not spec:
        raise ValueError(f"{name!r} is already registered; choose another name")
    registry[name] = spec
    return spec


def task_spec(recipe: Recipe) -> TaskSpec:
    """The registration of the recipe's task."""
    return TASKS[recipe.task.kind]


def open_dataset(recipe: Recipe, split: str) -> Any:
    """The "train" or "val" split of the recipe's data source, with the samples that its task reads.

    Raises UserError naming what is missing or invalid on disk.
    """
    kind = task_spec(recipe).sample_kind(recipe.task)
    dataset = SOURCES[recipe.data.source].datasets[kind](recipe.data, split)
    if hasattr(dataset, "pixel_format"):
        dataset.pixel_format = PixelFormat(recipe.model.in_chans or 3, recipe.data.background)
    return dataset


def sources_with(kind: str) -> list[str]:
    """Names of the data sources with this kind of sample."""
    return [source.name for source in SOURCES.values() if kind in source.datasets]


@cache
def recipe_type(task: type[Task], data: type[Data], source: type[Source]) -> Any:
    """`Recipe` with the sections of one task and one data source."""
    both = type("Data", (source, data), {"__module__": __name__})
    section: Any = dataclass(frozen=True, kw_only=True, config=STRICT)(both)
    return Recipe[task, section]  # type: ignore[valid-type]


def recipe_keys(kind: str, source: str) -> list[Key]:
    """Every key of a recipe with this task and this data source."""
    task, origin = TASKS[kind], SOURCES[source]
    sections = {field.name: field.type for field in dataclasses.fields(Recipe)}
    sections |= {"task": task.options, "data": task.data}
    found = [key for name, section in sections.items() for key in keys(section, f"{name}.")]
    return found + list(keys(origin.options, "data."))


def key_groups() -> Iterator[tuple[str, list[Key]]]:
    """(heading, keys) of the shared sections, of each task and of each data source."""
    sections = {field.name: field.type for field in dataclasses.fields(Recipe)}
    shared = {"task": Task, "data": Data}
    common = [key for name, section in sections.items() for key in keys(shared.get(name, section), f"{name}.")]
    yield "every recipe", common
    names = {key.name for key in common}
    for task in TASKS.values():
        own = [*keys(task.options, "task."), *keys(task.data, "data.")]
        yield f"task.kind={task.kind}", [key for key in own if key.name not in names]
    # sources with the same keys share a group
    groups: dict[type[Source], list[str]] = {}
    for source in SOURCES.values():
        groups.setdefault(source.options, []).append(source.name)
    for options, sources in groups.items():
        if found := list(keys(options, "data.")):
            yield f"data.source={', '.join(sources)}", found


def owners(key: str) -> list[str]:
    """The tasks and data sources that have the key or section `key`, for example ["data.source=tar, wds"]."""
    values: dict[str, list[str]] = {}
    for heading, found in key_groups():
        if any(one.name == key or one.name.startswith(f"{key}.") for one in found):
            chooser, _, names = heading.partition("=")
            values.setdefault(chooser, []).append(names)
    return ["=".join(filter(None, (chooser, ", ".join(names)))) for chooser, names in values.items()]
