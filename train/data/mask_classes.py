"""The classes of own masks: which value or color of the mask files is which class."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import UserError
from .class_file import DEFAULT_FILES, ClassEntry, Color, default_palette, find_class_file, read_class_file, read_color
from .mask_files import BLENDED, Survey, counted, matching_values, pack, read_mask_file, show, survey, unpack
from .segmentation import IGNORE_INDEX

MAX_CLASSES = 254  # a mask is uint8: 255 is ignored, 254 is a value without a class
NO_CLASS = 254
MAX_UNNAMED = 64  # classes that need no class file
SAMPLED = 64  # mask files that are looked at if a file names the classes


@dataclass
class MaskClasses:
    """The classes of a data set. table: value -> index or IGNORE_INDEX; `colored`: a value is r << 16 | g << 8 | b."""

    classes: list[str]
    palette: list[Color]
    table: dict[int, int]
    colored: bool


class OwnMasks:
    """Reads mask files of values or of colors, by the classes of the data set."""

    def __init__(self, classes: MaskClasses):
        self.classes = classes

    def __call__(self, path: str) -> np.ndarray:
        """Class indices or IGNORE_INDEX, uint8 [H, W]. Raises UserError naming values or colors without a class."""
        classes = self.classes
        values = matching_values(read_mask_file(path), classes.colored, path)
        table = lookup_table(tuple(sorted(classes.table.items())), 2**24 if classes.colored else 2**16)
        outside = values.size and not 0 <= values.min() <= values.max() < len(table)
        mask = np.full(values.shape, NO_CLASS, np.uint8) if outside else table[values]
        if mask.size and (mask == NO_CLASS).any():
            raise UserError(unknown_values(path, values[mask == NO_CLASS], mask.size, classes))
        return mask


@lru_cache(maxsize=4)
def lookup_table(pairs: tuple[tuple[int, int], ...], size: int) -> np.ndarray:
    """The class index of every value, uint8 [size]; made once per process, because for colors it takes 16 MiB."""
    table = np.full(size, NO_CLASS, np.uint8)
    for value, label in pairs:
        table[value] = label
    return table


def unknown_values(path: str, values: np.ndarray, pixels: int, classes: MaskClasses) -> str:
    """The error for values or colors of a mask file without a class, the most frequent ones first."""
    counts = Counter(dict(zip(*counted(values), strict=True)))
    kind = "color" if classes.colored else "value"
    listed = ", ".join(f"{show(value, classes.colored)} ({count:,})" for value, count in counts.most_common(5))
    more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
    known = sorted(value for value, label in classes.table.items() if label != IGNORE_INDEX)
    shown = ", ".join(show(value, classes.colored) for value in known[:12]) + ", ..." * (len(known) > 12)
    blended = f"; it may have been {BLENDED}" if len(counts) > 5 else ""
    share = 100 * len(values) / pixels
    return (
        f"mask {path} has {kind}s that are no class, on {len(values):,} pixels ({share:.2g} %): {listed}{more}. The "
        f"{kind}s of the classes are {shown}{blended}; data.class_map names classes, data.ignore what is unlabelled"
    )


def find_classes(
    masks: Sequence[Path], root: Path, class_map: str | None, ignore: Sequence[int | str] | None
) -> MaskClasses:
    """The classes of the mask files of a data set, of both splits.

    They are those of the class file (`data.class_map`, or one of a default name in `root`). Without one, the values in
    the masks are the classes: 0 and another one are background and foreground; else they must run from 0 without gaps
    and are named by their number. Raises UserError saying what to write where this is not so.
    """
    file = find_class_file(root, class_map)
    if file is not None:
        step = max(1, len(masks) // SAMPLED)
        return _named_classes(read_class_file(file), survey(masks[::step]), ignore, file)
    return _unnamed_classes(survey(masks), ignore, root)


def _named_classes(
    entries: list[ClassEntry], found: Survey, ignore: Sequence[int | str] | None, file: Path
) -> MaskClasses:
    colors = {pack(entry.color): entry for entry in entries if entry.color is not None}
    # palette indices of masks whose colors are all known need not be in the order of the file
    known = colors.keys() | _colors_in(ignore)
    colored = bool(colors) and (not found.indexed or (found.paletted and found.colors.keys() <= known))
    if not found.indexed and not colors:
        raise UserError(
            f"the masks have colors ({_colors(found)}), but {file} gives none; {_table(found.colors, True, entries)}"
        )
    if colored:
        values = {entry.name: value for value, entry in colors.items()}
    else:
        values = {entry.name: number if entry.value is None else entry.value for number, entry in enumerate(entries)}
        if len(entries) == 2 and entries[0].value is None and ignore is None and found.values.keys() == {0, 255}:
            values[entries[1].name] = 255  # a mask of black and white
        _check_order(entries, values, colors, found, file)
    ignored = _ignored(ignore, values, colored)
    kept = [entry for entry in entries if values[entry.name] not in ignored]
    given = [entry.color for entry in kept if entry.color is not None]
    return _classes({entry.name: values[entry.name] for entry in kept}, given or None, found, ignored, colored)


def _check_order(
    entries: list[ClassEntry], values: Mapping[str, int], colors: Mapping[int, ClassEntry], found: Survey, file: Path
) -> None:
    """Raises UserError if the color of a value in the masks' palettes is that of another class."""
    for entry in entries:
        other = colors.get(found.palette.get(values[entry.name], -1), entry)
        if entry.value is None and other is not entry:
            unknown = [show(color, True) for color, _ in found.colors.most_common() if color not in colors][:5]
            raise UserError(
                f"the value {values[entry.name]} of the masks is the class {entry.name} by {file}, but has the color "
                f"of {other.name}; list all colors in the masks there or in data.ignore ({', '.join(unknown)} are "
                "missing), or give each class its value"
            )


def _unnamed_classes(found: Survey, ignore: Sequence[int | str] | None, root: Path) -> MaskClasses:
    if not found.indexed:
        raise UserError(f"the masks have colors ({_colors(found)}); {_table(found.colors, True, root=root)}")
    binary = ignore is None and len(found.values) == 2 and 0 in found.values
    ignored = _ignored(() if binary else ignore, {}, False)
    values = sorted(found.values.keys() - ignored)
    if len(values) == 2 and values[0] == 0:
        names = ["background", "foreground"]
    elif values == list(range(len(values))) and len(values) <= MAX_UNNAMED:
        names = [str(value) for value in values]
    else:
        listed = ", ".join(f"{value} ({count:,} pixels)" for value, count in found.values.most_common(8))
        raise UserError(
            f"the values in the masks do not run from 0 without gaps ({listed}{', ...' * (len(found.values) > 8)}); "
            f"{_table(Counter({value: found.values[value] for value in values}), False, root=root)}. If they should "
            f"have fewer values, they may have been {BLENDED}"
        )
    return _classes(dict(zip(names, values, strict=True)), None, found, ignored, False)


def _classes(
    values: Mapping[str, int], palette: list[Color] | None, found: Survey, ignored: set[int], colored: bool
) -> MaskClasses:
    """The classes in their order. palette: their colors; None: those of the masks' palettes, else distinct ones."""
    if not 2 <= len(values) <= MAX_CLASSES:
        raise UserError(
            f"the masks have {len(values)} classes ({', '.join([*values][:5])}); a segmentation needs 2 to "
            f"{MAX_CLASSES}. data.class_map names them, data.ignore lists values that are none"
        )
    if palette is None:
        palette = [unpack(found.palette[value]) for value in values.values() if value in found.palette]
        if len(palette) < len(values) or all(color == (color[0],) * 3 for color in palette):
            palette = default_palette(len(values))
    table = {value: number for number, value in enumerate(values.values())}
    table |= dict.fromkeys(ignored, IGNORE_INDEX)
    if outside := [value for value in table if not (colored or 0 <= value < 2**16)]:
        raise UserError(f"the value {outside[0]} is not one of 0 to 65535, which a mask can have")
    return MaskClasses(list(values), palette, table, colored)


def _colors_in(ignore: Sequence[int | str] | None) -> set[int]:
    """The colors that `data.ignore` lists."""
    try:
        return {pack(read_color(one)) for one in ignore or () if isinstance(one, str) and one.startswith("#")}
    except ValueError as error:
        raise UserError(f"data.ignore: {error}") from error


def _ignored(ignore: Sequence[int | str] | None, values: Mapping[str, int], colored: bool) -> set[int]:
    """The values that `data.ignore` lists, by value, color or class name; if it is not given, 255 unless a class is."""
    if ignore is None:
        return set() if colored or IGNORE_INDEX in values.values() else {IGNORE_INDEX}
    found = _colors_in(ignore) if colored else {one for one in ignore if isinstance(one, int)}
    names = [one for one in ignore if isinstance(one, str) and not (colored and one.startswith("#"))]
    if wrong := [one for one in ignore if isinstance(one, int)] if colored else []:
        raise UserError(f"data.ignore: {wrong[0]} must be a color like #ffffff, as the classes are, or a class")
    if wrong := [name for name in names if name not in values]:
        raise UserError(f"data.ignore: {wrong[0]!r} is none of the classes {', '.join([*values][:12])}")
    return found | {values[name] for name in names}


def _table(counts: Counter[int], colored: bool, entries: Sequence[ClassEntry] = (), *, root: Path | None = None) -> str:
    """What to write into a class file, by the values or colors that were found."""
    values = [value for value, _ in counts.most_common(6)] if colored else sorted(counts)[:6]
    names = [entry.name for entry in entries] or [f"class{number}" for number in range(len(values))]
    rows = [f"{name},{show(value, colored)}" for name, value in zip(names, values, strict=False)]
    place = f"write {root / DEFAULT_FILES[0]}" if root else "write a .csv file"
    return f"{place} with the lines: name,{'color' if colored else 'value'} / {' / '.join(rows)} / ... (one per class)"


def _colors(found: Survey) -> str:
    listed = ", ".join(f"{show(value, True)} on {count:,} pixels" for value, count in found.colors.most_common(5))
    return listed + f" and {len(found.colors) - 5} more" * (len(found.colors) > 5)
