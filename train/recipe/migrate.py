"""Recipes of earlier formats, as the current code reads them.

The format number rises with every change that an unchanged reader would misread: a renamed or removed key, a changed
default or meaning. A new key with a neutral default needs no new format. Each change has a migration here, a line in
UPGRADING.md, and is tested on tests/artefacts.

Format 2 (0.2): keys below were renamed; a recipe holds only the keys of its own task and data source.
Format 1 (0.1): every recipe.yaml of a run listed the keys of all tasks and data sources. It has no format number.
"""

from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..files import check_format
from .registry import SOURCES, TASKS, recipe_keys

FORMAT = 2
RENAMED = {
    "model.drop_path": "model.drop_path_rate",
    "data.fit": "data.img_scale",
    "data.aug.repeats": "data.aug.repeated_aug",
    "data.aug.crop_share": "data.aug.cat_max_ratio",
    "task.detect.short": "task.detect.min_size",
    "task.detect.longest": "task.detect.max_size",
    "task.detect.train": "data.train",
    "task.detect.val": "data.val",
}
# defaults of format 1 for the keys that not every task and data source has, by their present names
FORMAT_1_DEFAULTS: dict[str, Any] = {
    "task.num_classes": None,
    "task.loss": "ce",
    "task.smoothing": 0.0,
    "task.probe": None,
    "task.distill.teacher": None,
    "task.distill.kind": "soft",
    "task.distill.weight": 0.5,
    "task.distill.temperature": 1.0,
    "task.dense.batch_norm": "train",
    "task.dense.norms": None,
    "task.segment.decode_head": {},
    "task.segment.auxiliary_head": {},
    "task.segment.neck": {},
    "task.segment.class_weight": {},
    "task.segment.load_from": None,
    "task.segment.test.mode": "whole",
    "task.segment.test.crop": None,
    "task.segment.test.stride": None,
    "task.segment.test.flip": False,
    "task.segment.test.scales": [1.0],
    "task.segment.test.divisor": None,
    "task.detect.detector": "fcos",
    "task.detect.channels": 256,
    "task.detect.anchor": None,
    "task.detect.min_size": None,
    "task.detect.max_size": 1333,
    "task.detect.crop": None,
    "task.detect.empty": False,
    "task.detect.kwargs": {},
    "data.train": ["annotations/instances_train2017.json", "train2017"],
    "data.val": ["annotations/instances_val2017.json", "val2017"],
    "data.root": None,
    "data.name": None,
    "data.train_split": None,
    "data.val_split": None,
    "data.input_key": None,
    "data.target_key": None,
    "data.class_map": None,
    "data.scenes": 1000,
    "data.img_scale": None,
    "data.interpolation": None,
    "data.crop_pct": None,
    "data.aug.scale": [1.0, 1.0],
    "data.aug.ratio": [1.0, 1.0],
    "data.aug.rotate": 0.0,
    "data.aug.translate": 0.0,
    "data.aug.zoom": 0.0,
    "data.aug.shear": 0.0,
    "data.aug.color_jitter": 0.0,
    "data.aug.auto_augment": None,
    "data.aug.erasing": 0.0,
    "data.aug.mixup": 0.0,
    "data.aug.cutmix": 0.0,
    "data.aug.mix_prob": 1.0,
    "data.aug.switch_prob": 0.5,
    "data.aug.resize": [1.0, 1.0],
    "data.aug.cat_max_ratio": 1.0,
    "data.aug.photometric": False,
}

# format 1 accepted these for every data source
FORMAT_1_IGNORED = {"data.scenes"}


def migrate(data: dict[str, Any], source: str) -> int:
    """Rename the keys of a recipe, in place, to the current format. Returns the format in which it was written.

    source: what errors call the recipe. Raises NewerFormatError for a format of a later version of tessel.
    """
    written = check_format(data, FORMAT, source)
    data.pop("format", None)
    data.pop("tessel", None)
    # a recipe written by hand has no format number and may use the names of any format
    rename_keys(data)
    return written


def rename_keys(data: dict[str, Any]) -> None:
    """Move the values of renamed keys to their present names. Raises UserError if both names are given."""
    for old, new in RENAMED.items():
        section = _section(data, old)
        name = old.rpartition(".")[2]
        if section is None or name not in section:
            continue
        value = section.pop(name)
        *path, last = new.split(".")
        target: Any = data
        for part in path:
            target = target.setdefault(part, {})
        if last in target:
            raise UserError(f"{old} is the former name of {new}, and both are given; remove {old}")
        target[last] = value


def present_name(key: str) -> str:
    """The present name of a dotted key."""
    return RENAMED.get(key, key)


def drop_unused_keys(data: dict[str, Any]) -> None:
    """Remove from a recipe of format 1, in place, the keys of other tasks and data sources that had no effect."""
    task, source = _mapping(data.get("task")).get("kind", "classify"), _mapping(data.get("data")).get("source")
    if not (isinstance(task, str) and task in TASKS and isinstance(source, str) and source in SOURCES):
        return
    own = {key.name for key in recipe_keys(task, source)}
    for key, default in FORMAT_1_DEFAULTS.items():
        section, name = _section(data, key), key.rpartition(".")[2]
        if key in own or section is None or name not in section:
            continue
        if section[name] == default or key in FORMAT_1_IGNORED:
            del section[name]
    for path in ("task.distill", "task.dense", "task.segment.test", "task.segment", "task.detect"):
        section, name = _section(data, path), path.rpartition(".")[2]
        if section is not None and section.get(name) == {}:
            del section[name]


def _section(data: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The mapping that would hold `key`, or None."""
    section: Any = data
    for part in key.split(".")[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """One text for each key whose value differs between two flat recipes."""
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            yield f"{key} (there {before.get(key)!r}, now {now.get(key)!r})"
