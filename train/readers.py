"""Data in archives and of other libraries, with random access: any sample by its index, in any process.

tar    ROOT/SPLIT.tar, or all of ROOT/SPLIT/*.tar: images, their class is the folder they are in, else their archive
wds    the same places: WebDataset's samples, KEY.jpg beside KEY.cls or KEY.json
hfds   a Hugging Face dataset, by timm's reader
tfds   a TensorFlow dataset that was prepared as array_record; TFRecord knows no random access

A SPLIT may also be a pattern of archives, as in data.train_split='imagenet-train-*.tar'. Archives are indexed once a
start, by their headers alone: timm's reader of tar files reads them whole for that, in the order of the directory, and
shares its file positions with forked loader processes; its readers of WebDataset and TFDS are streams, which cannot be
resumed at a sample.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import create_reader
from timm.data.readers.class_map import load_class_map
from torch.utils.data import Dataset

from .data import EXTENSIONS, decoded
from .errors import UserError, one_line
from .schema import Data

REFUSALS = (ImportError, OSError, ValueError, KeyError, RuntimeError, AssertionError, NotImplementedError)
PACKAGES = {"hfds": ("datasets", "datasets"), "tfds": ("tensorflow_datasets", "tensorflow-datasets")}


class Member(NamedTuple):
    """A file in an archive: its path there, its place in the archive's bytes, and the archive's name within another."""

    path: PurePosixPath
    offset: int
    size: int
    within: str = ""


class Archived(Dataset[tuple[Image.Image, int]]):
    """Images at known places of archives; all in arrays, so that workers share the memory."""

    def __init__(self, archives: Sequence[Path], images: Sequence[tuple[int, Member]], labels: list[str], data: Data):
        """images: number of the archive, and the member, of each image; labels: of each image."""
        self.archives, self.classes = [str(path) for path in archives], _classes(labels, data)
        self.archive, self.offsets, self.sizes = (
            np.array([*column], dtype=np.int64)
            for column in zip(*((number, member.offset, member.size) for number, member in images), strict=True)
        )
        self.names = np.array([str(member.path).encode() for _, member in images])
        number = {name: index for index, name in enumerate(self.classes)}
        self.targets = np.array([_number(label, number, data) for label in labels])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        archive = self.archives[self.archive[index]]

        def read() -> io.BytesIO:
            with open(archive, "rb") as file:
                file.seek(int(self.offsets[index]))
                return io.BytesIO(file.read(int(self.sizes[index])))

        return decoded(read, f"{archive}:{self.names[index].decode()}"), int(self.targets[index])


class Foreign(Dataset[tuple[Image.Image, int]]):
    """Samples that another library fetches: `fetch(index)` gives a binary file of the image, and the class."""

    def __init__(self, fetch: Callable[[int], tuple[Any, Any]], length: int, classes: list[str], name: str):
        self.fetch, self.length, self.classes, self.name = fetch, length, classes, name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        target = -1

        def read() -> Any:
            nonlocal target
            file, label = self.fetch(index)
            target = int(label)
            return file

        return decoded(read, f"{index} of {self.name}"), target


def open_reader(data: Data, split: str) -> Archived | Foreign:
    """The split of `data.source`, one of tar, wds, hfds, tfds. Raises UserError, also for a package that is missing."""
    package, distribution = PACKAGES.get(data.source, (None, None))
    if package and find_spec(package) is None:
        raise UserError(f"data.source={data.source} needs the package {package}: pip install {distribution}")
    return {"tar": open_tar, "wds": open_wds, "hfds": open_hfds, "tfds": open_tfds}[data.source](data, split)


def open_tar(data: Data, split: str) -> Archived:
    """Images of one archive, of several, or of archives within one."""
    archives = _archives(data, split)
    alone = archives == [Path(str(data.root)) / f"{split}.tar"]
    images, labels = [], []
    for number, archive in enumerate(archives):
        for member in _members(archive):
            if member.path.suffix.lower() not in EXTENSIONS:
                continue
            parts = ["" if alone else archive.stem, member.within, member.path.parent.name]
            label = next(filter(None, reversed(parts)), None)
            if label is None:
                raise UserError(f"{archive}:{member.path} is in no folder, which would be its class")
            images.append((number, member))
            labels.append(label)
    return _archived(archives, images, labels, data)


def open_wds(data: Data, split: str) -> Archived:
    """WebDataset's samples: files of one name up to its first dot, next to each other; the class by number or name."""
    endings = [f".{key.strip()}" for key in data.input_key.split(";")] if data.input_key else sorted(EXTENSIONS)
    archives, images, labels = _archives(data, split), [], []
    for number, archive in enumerate(archives):
        with open(archive, "rb") as file:
            for key, group in groupby(_members(archive), lambda member: _key(member.path)):
                files = {member.path.name[len(PurePosixPath(key).name) :].lower(): member for member in group}
                image = next((files[ending] for ending in endings if ending in files), None)
                sidecar = files.get(".json" if data.target_key else ".cls")
                if image is None or sidecar is None:
                    wanted = f"{', '.join(endings)} beside {'.json' if data.target_key else '.cls'}"
                    raise UserError(f"{archive}: sample {key} has {', '.join(sorted(files))}; it needs {wanted}")
                file.seek(sidecar.offset)
                images.append((number, image))
                labels.append(_label(file.read(sidecar.size), data.target_key, f"{archive}:{sidecar.path}"))
    return _archived(archives, images, labels, data)


def open_hfds(data: Data, split: str) -> Foreign:
    """A Hugging Face dataset: `data.name` on the hub or a local folder, `data.root` its cache."""
    keys = {"input_key": data.input_key, "target_key": data.target_key}
    mapping = {name: index for index, name in enumerate(_mapped(data))} if data.class_map else None
    name = f"split {split} of {data.name}"
    try:
        reader: Any = create_reader(f"hfds/{data.name}", root=data.root, split=split, class_map=mapping, **keys)
        named = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        classes = named or [str(number) for number in range(1 + max(map(int, reader.iter_targets())))]
    except REFUSALS as error:
        raise UserError(f"data.source=hfds: {name} cannot be read: {one_line(error)}") from error
    return Foreign(reader.__getitem__, len(reader), classes, name)


def open_tfds(data: Data, split: str) -> Foreign:
    """A prepared TensorFlow dataset: `data.name` below `data.root` (null: ~/tensorflow_datasets)."""
    image, label, name = data.input_key or "image", data.target_key or "label", f"split {split} of {data.name}"
    try:
        tfds = import_module("tensorflow_datasets")
        builder = tfds.builder(data.name, data_dir=data.root)
        source = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
        length, names = len(source), list(builder.info.features[label].names)
    except (*REFUSALS, AttributeError, TypeError) as error:
        raise UserError(
            f"data.source=tfds: {name} cannot be read at random: {one_line(error)}; prepare it with "
            f"tfds build {data.name} --file_format=array_record"
        ) from error
    classes = _mapped(data) if data.class_map else names
    number = {key: index for index, key in enumerate(classes)}
    targets = [_number(key, number, data) for key in names]

    def fetch(index: int) -> tuple[io.BytesIO, int]:
        # opens its files here, so after the fork of a loader process, which they do not survive
        example = source[index]
        return io.BytesIO(example[image]), targets[int(example[label])]

    return Foreign(fetch, length, classes, name)


def _archived(archives: list[Path], images: list[tuple[int, Member]], labels: list[str], data: Data) -> Archived:
    if not images:
        raise UserError(f"{archives[0]} and its like hold no images ({', '.join(sorted(EXTENSIONS))})")
    return Archived(archives, images, labels, data)


def _archives(data: Data, split: str) -> list[Path]:
    """ROOT/SPLIT.tar, else ROOT/SPLIT/*.tar, else the archives that match ROOT/SPLIT, by name."""
    root = Path(str(data.root))
    if (single := root / f"{split}.tar").is_file():
        return [single]
    try:
        found = sorted([*root.glob(f"{split}/*.tar"), *(path for path in root.glob(split) if path.suffix == ".tar")])
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"archives {split} in {root} cannot be listed ({error})") from error
    if not found:
        raise UserError(f"there is no {single} and no archive {root / split}/*.tar; see data.root and data.train_split")
    return found


def _members(archive: Path) -> Iterator[Member]:
    """The files of an uncompressed archive and of those within it, in its order. Raises UserError for another file."""
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if not member.isfile() or member.issparse():
                    continue
                if not member.name.lower().endswith(".tar"):
                    yield Member(PurePosixPath(member.name), member.offset_data, member.size)
                    continue
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    for file in inner:
                        if file.isfile() and not file.issparse():
                            place = member.offset_data + file.offset_data
                            name = PurePosixPath(member.name).stem
                            yield Member(PurePosixPath(file.name), place, file.size, within=name)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"archive {archive} cannot be read ({error}); it must be whole, and a tar file without compression"
        ) from error


def _key(path: PurePosixPath) -> str:
    return str(path.parent / path.name.partition(".")[0])


def _label(content: bytes, key: str | None, name: str) -> str:
    try:
        value = content.decode() if key is None else json.loads(content)[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} gives no class ({type(error).__name__}: {error}); see data.target_key") from error
    return str(value).strip()


def _classes(labels: list[str], data: Data) -> list[str]:
    """What data.class_map lists, else numbers up to the highest (WebDataset), else names by alphabet, as of folders."""
    if data.class_map:
        return _mapped(data)
    found = set(labels)
    if data.source == "wds" and all(label.isdecimal() for label in found):
        return [str(number) for number in range(1 + max(map(int, found)))]
    return sorted(found)


def _mapped(data: Data) -> list[str]:
    try:
        mapping = load_class_map(str(data.class_map), data.root or "")
    except (OSError, AssertionError, ValueError) as error:
        raise UserError(f"data.class_map={data.class_map} cannot be read: {one_line(error)}") from error
    return [name for name in sorted(mapping, key=mapping.__getitem__) if name]


def _number(label: str, number: dict[str, int], data: Data) -> int:
    """The index of a class given by its name, or as WebDataset has it by its number."""
    if label in number:
        return number[label]
    if data.source == "wds" and label.isdecimal() and int(label) < len(number):
        return int(label)
    raise UserError(f"class {label!r} is not in data.class_map={data.class_map}, which must list every class")
