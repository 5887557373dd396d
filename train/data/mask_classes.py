"""The classes of own masks: which value or color of the mask files is which class, and how they are read.

A mask file has one value per pixel (a palette index or a gray level) or one color per pixel.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError
from .class_file import DEFAULT_FILES, ClassEntry, Color, default_palette, find_class_file, hex_color, read_class_file
from .class_file import read_color as parse_color
from .image_io import decoding_errors
from .segmentation import IGNORE_INDEX, INDEX_MODES

MAX_CLASSES = 254  # a mask is uint8: 255 is ignored, 254 is a value without a class
NO_CLASS = 254
MAX_COLORS = 256  # of one mask file; more are a photo or the blend of antialiased borders
MAX_UNNAMED = 64  # classes that need no class file
SAMPLED = 64  # mask files that are looked at if a file names the classes
THREADS = 8
LOSSY = ("JPEG", "WEBP", "MPO")  # formats that change colors and values
BLENDED = (
    "antialiased or resized with interpolation: write masks without antialiasing, and resize them with the nearest "
    "neighbor"
)


@dataclass
class MaskClasses:
    """The classes of a data set. table: value -> index or IGNORE_INDEX; `colored`: a value is r << 16 | g << 8 | b."""

    classes: list[str]
    palette: list[Color]
    table: dict[int, int]
    colored: bool


class MaskFile(NamedTuple):
    """values: [H, W] int32, of a colored mask r << 16 | g << 8 | b; palette: color of each value of an indexed one."""

    values: np.ndarray
    colored: bool
    palette: list[Color] | None


@dataclass
class Survey:
    """What some mask files contain. values, colors: number of pixels by value and by color."""

    values: Counter[int] = field(default_factory=Counter)
    colors: Counter[int] = field(default_factory=Counter)
    palette: dict[int, int] = field(default_factory=dict)  # value -> color, of the first mask that has the value
    indexed: bool = True  # every mask has one value per pixel, or is gray
    paletted: bool = True  # every mask has a color palette, or colors


class OwnMasks:
    """Reads mask files of values or of colors, by the classes of the data set."""

    def __init__(self, classes: MaskClasses):
        self.classes = classes

    def __call__(self, path: str) -> np.ndarray:
        """Class indices or IGNORE_INDEX, uint8 [H, W]. Raises UserError naming values or colors without a class."""
        classes = self.classes
        values = matching_values(read_mask_file(path), classes.colored, path)
        outside = values.size and not 0 <= values.min() <= values.max() < 2**24
        mask = np.full(values.shape, NO_CLASS, np.uint8) if outside else lookup_table(*freeze(classes))[values]
        if mask.size and (mask == NO_CLASS).any():
            raise UserError(unknown_values(path, values[mask == NO_CLASS], mask.size, classes))
        return mask


def freeze(classes: MaskClasses) -> tuple[tuple[tuple[int, int], ...], int]:
    """The arguments of `lookup_table`."""
    return tuple(sorted(classes.table.items())), 2**24 if classes.colored else 2**16


@lru_cache(maxsize=4)
def lookup_table(pairs: tuple[tuple[int, int], ...], size: int) -> np.ndarray:
    """The class index of every value, uint8 [size]; made once per process, because for colors it takes 16 MiB."""
    table = np.full(size, NO_CLASS, np.uint8)
    for value, label in pairs:
        table[value] = label
    return table


def unknown_values(path: str, values: np.ndarray, pixels: int, classes: MaskClasses) -> str:
    """The error for values or colors of a mask file without a class, the most frequent ones first."""
    counts = Counter(dict(zip(*_counted(values), strict=True)))
    kind = "color" if classes.colored else "value"
    listed = ", ".join(f"{_show(value, classes.colored)} ({count:,})" for value, count in counts.most_common(5))
    more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
    known = ", ".join(_show(value, classes.colored) for value in sorted(classes.table)[:12])
    blended = f"; it may have been {BLENDED}" if len(counts) > 5 else ""
    share = 100 * len(values) / pixels
    return (
        f"mask {path} has {kind}s that are no class, on {len(values):,} pixels ({share:.2g} %): {listed}{more}. The "
        f"{kind}s of the classes are {known}{', ...' * (len(classes.table) > 12)}{blended}; data.class_map names "
        "classes, data.ignore what is unlabelled"
    )


def read_mask_file(path: str) -> MaskFile:
    """The values or colors of a mask file.

    Raises UserError for a damaged file, and for one that is no mask: lossy, partly transparent or of another mode.
    """
    with decoding_errors(f"mask {path}"), Image.open(path) as mask:
        if mask.format in LOSSY:
            raise UserError(f"mask {path} is a {mask.format} file, which changes values; save masks as PNG")
        if mask.mode in INDEX_MODES:
            palette = _palette(mask) if mask.mode == "P" else None
            return MaskFile(np.array(mask).astype(np.int32), False, palette)
        if mask.mode not in ("RGB", "RGBA", "LA", "PA"):
            raise UserError(
                f"mask {path} is an image of mode {mask.mode}; a mask has one value (modes P, L, "
                "I;16) or one color (mode RGB) per pixel"
            )
        if mask.mode != "RGB" and mask.getchannel("A").getextrema() != (255, 255):
            raise UserError(f"mask {path} is transparent in part; save it without an alpha channel")
        pixels = np.asarray(mask.convert("RGB")).astype(np.int32)
        return MaskFile(pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2], True, None)


def matching_values(file: MaskFile, colored: bool, path: str) -> np.ndarray:
    """The values of a mask as the classes are given, by colors or by values. Raises UserError if it has none such."""
    if file.colored == colored:
        return file.values
    if colored:
        if file.palette is None:
            return file.values.clip(0, 255) * 0x010101
        return np.array([_pack(color) for color in file.palette], np.int32)[file.values]
    if (file.values != (file.values & 255) * 0x010101).any():
        raise UserError(
            f"mask {path} has colors, where the classes are values; save it with one value per pixel, or give each "
            "class a color in the file of data.class_map"
        )
    return file.values & 255


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


def survey(masks: Sequence[Path]) -> Survey:
    """The values and colors in the mask files. Damaged ones are left out: they are told when they are read."""
    found = Survey()
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(_survey_file, masks):
            if part is not None:
                found.values += part.values
                found.colors += part.colors
                found.palette = part.palette | found.palette
                found.indexed &= part.indexed
                found.paletted &= part.paletted
    return found


def _survey_file(path: Path) -> Survey | None:
    try:
        file = read_mask_file(str(path))
    except UserError:
        if path.suffix.lower() in (".jpg", ".jpeg", ".webp"):
            raise
        return None
    values, counts = _counted(file.values)
    if file.colored:
        if len(values) > MAX_COLORS:
            raise UserError(f"mask {path} has {len(values):,} colors; it is no mask, or was {BLENDED}")
        grey = all(value == (value & 255) * 0x010101 for value in values)
        by_value = Counter({value & 255: count for value, count in zip(values, counts, strict=True)} if grey else {})
        return Survey(by_value, Counter(dict(zip(values, counts, strict=True))), indexed=grey)
    by_value = Counter(dict(zip(values, counts, strict=True)))
    if file.palette is None:
        return Survey(by_value, paletted=False)
    palette = {value: _pack(file.palette[value]) for value in values}
    by_color: Counter[int] = Counter()
    for value, count in by_value.items():
        by_color[palette[value]] += count
    return Survey(by_value, by_color, palette)


def _counted(values: np.ndarray) -> tuple[list[int], list[int]]:
    """The values that occur, rising, and how often each does."""
    if values.size and 0 <= values.min() <= values.max() < 2**16:  # many times faster than sorting
        counts = np.bincount(values.ravel())
        found = counts.nonzero()[0]
        return found.tolist(), counts[found].tolist()
    found, counts = np.unique(values, return_counts=True)
    return found.tolist(), counts.tolist()


def _named_classes(
    entries: list[ClassEntry], found: Survey, ignore: Sequence[int | str] | None, file: Path
) -> MaskClasses:
    colors = {_pack(entry.color): entry for entry in entries if entry.color is not None}
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
            unknown = [_show(color, True) for color, _ in found.colors.most_common() if color not in colors][:5]
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
        palette = [_unpack(found.palette[value]) for value in values.values() if value in found.palette]
        if len(palette) < len(values) or all(color == (color[0],) * 3 for color in palette):
            palette = default_palette(len(values))
    table = {value: number for number, value in enumerate(values.values())}
    table |= dict.fromkeys(ignored, IGNORE_INDEX)
    if outside := [value for value in table if value >= 2**16 and not colored]:
        raise UserError(f"the value {outside[0]} is not one of 0 to 65535, which a mask can have")
    return MaskClasses(list(values), palette, table, colored)


def _colors_in(ignore: Sequence[int | str] | None) -> set[int]:
    """The colors that `data.ignore` lists."""
    try:
        return {_pack(parse_color(one)) for one in ignore or () if isinstance(one, str) and one.startswith("#")}
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
    rows = [f"{name},{_show(value, colored)}" for name, value in zip(names, values, strict=False)]
    place = f"write {root / DEFAULT_FILES[0]}" if root else "write a .csv file"
    return f"{place} with the lines: name,{'color' if colored else 'value'} / {' / '.join(rows)} / ... (one per class)"


def _colors(found: Survey) -> str:
    listed = ", ".join(f"{_show(value, True)} on {count:,} pixels" for value, count in found.colors.most_common(5))
    return listed + f" and {len(found.colors) - 5} more" * (len(found.colors) > 5)


def _show(value: int, colored: bool) -> str:
    return hex_color(_unpack(value)) if colored else str(value)


def _palette(mask: Image.Image) -> list[Color]:
    """256 colors; those that the file does not define are black."""
    numbers = (mask.convert("P").getpalette("RGB") or [])[:768]
    numbers += [0] * (768 - len(numbers))
    return [(numbers[at], numbers[at + 1], numbers[at + 2]) for at in range(0, 768, 3)]


def _pack(color: Sequence[int]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def _unpack(value: int) -> Color:
    return value >> 16, value >> 8 & 255, value & 255
