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
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ...errors import UserError
from ...recipe.schema import Data
from ..class_map import _classes, _number
from ..image_io import EXTENSIONS, decoded


class Member(NamedTuple):
    """A file in an archive: its path there, its place in the archive's bytes, and the archive's name within another."""

    path: PurePosixPath
    offset: int
    size: int
    within: str = ""


class ArchiveDataset(Dataset[tuple[Image.Image, int]]):
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


def open_tar(data: Data, split: str) -> ArchiveDataset:
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


def open_wds(data: Data, split: str) -> ArchiveDataset:
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


def _archived(archives: list[Path], images: list[tuple[int, Member]], labels: list[str], data: Data) -> ArchiveDataset:
    if not images:
        raise UserError(f"{archives[0]} and its like hold no images ({', '.join(sorted(EXTENSIONS))})")
    return ArchiveDataset(archives, images, labels, data)


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
