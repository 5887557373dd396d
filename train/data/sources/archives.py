"""`data.source=tar` and `wds`: images in tar archives, with random access to any sample from any process.

tar    ROOT/SPLIT.tar, or all of ROOT/SPLIT/*.tar; the class of an image is its folder, else its archive
wds    the same archives with WebDataset samples: KEY.jpg beside KEY.cls or KEY.json

SPLIT may also be a pattern, as in data.train_split='imagenet-train-*.tar'. At the start the headers of the archives are
read to index them. timm's tar reader reads whole archives for that and shares its file positions with forked workers;
its readers of WebDataset and TFDS are streams, which cannot resume at a given sample.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic.dataclasses import dataclass

from ...errors import UserError
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath, Source
from ..class_map import class_index, class_names
from ..image_io import EXTENSIONS, RGB, read_image

MAX_LABEL = 1000  # letters


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Tar(Source):
    root: FilePath
    """folder with {train,val}.tar or {train,val}/*.tar"""
    train_split: str | None = None
    """training archives: a name or a pattern like imagenet-train-*.tar; null: train"""
    val_split: str | None = None
    """validation archives: a name or a pattern; null: val"""
    class_map: FilePath | None = None
    """text file with one class per line; null: the classes found in the archives"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WebDataset(Tar):
    input_key: str | None = None
    """extensions of the images, for example jpg;png; null: all known ones"""
    target_key: str | None = None
    """key of the class in KEY.json; null: the class is in KEY.cls"""


class Member(NamedTuple):
    """A file in an archive: its path, offset and size in bytes, and the archive that contains it within another."""

    path: PurePosixPath
    offset: int
    size: int
    within: str = ""


class ArchiveDataset:
    """(RGB image, class index) at known offsets of archives, kept in arrays whose memory workers share."""

    pixel_format = RGB
    decode: Any = staticmethod(read_image)

    def __init__(
        self,
        archives: Sequence[Path],
        images: Sequence[tuple[int, Member]],
        labels: list[str],
        data: Tar,
        *,
        numbered: bool = False,
    ):
        """images: (archive number, member) per image; labels: class name, or with `numbered` number, per image."""
        if not images:
            raise UserError(f"{archives[0]} (and others, if any) has no images ({', '.join(sorted(EXTENSIONS))})")
        self.archives = [str(path) for path in archives]
        self.classes = class_names(labels, data, numbered=numbered)
        self.archive, self.offsets, self.sizes = (
            np.array([*column], dtype=np.int64)
            for column in zip(*((number, member.offset, member.size) for number, member in images), strict=True)
        )
        self.names = np.array([os.fsencode(member.path) for _, member in images])
        index = {name: number for number, name in enumerate(self.classes)}
        self.targets = np.array([class_index(label, index, data, numbered=numbered) for label in labels])

    def __len__(self) -> int:
        return len(self.targets)

    def image_path(self, index: int) -> str:
        return f"{self.archives[self.archive[index]]}:{os.fsdecode(self.names[index])}"

    def contents(self) -> list[np.ndarray]:
        """What a run records of the samples; see `data.fingerprint`."""
        return [self.sizes, self.targets]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        archive = self.archives[self.archive[index]]

        def open_file() -> io.BytesIO:
            with open(archive, "rb") as file:
                file.seek(int(self.offsets[index]))
                return io.BytesIO(file.read(int(self.sizes[index])))

        return self.decode(open_file, self.image_path(index), pixel_format=self.pixel_format), int(self.targets[index])


def open_tar(data: Tar, split: str) -> ArchiveDataset:
    """Images of one archive, of several, or of archives within an archive. Raises UserError if one is damaged."""
    name = _split_name(data, split)
    archives = _list_archives(data, name)
    single = archives == [Path(data.root) / f"{name}.tar"]
    images, labels = [], []
    for number, archive in enumerate(archives):
        for member in _read_members(archive):
            if member.path.suffix.lower() not in EXTENSIONS:
                continue
            folders = ["" if single else archive.stem, member.within, member.path.parent.name]
            label = next(filter(None, reversed(folders)), None)
            if label is None:
                raise UserError(f"{archive}:{member.path} is in no folder, which would name its class")
            images.append((number, member))
            labels.append(label)
    return ArchiveDataset(archives, images, labels, data)


def open_wds(data: WebDataset, split: str) -> ArchiveDataset:
    """WebDataset samples: adjacent files with one name up to the first dot. Raises UserError if one is incomplete."""
    extensions = [f".{key.strip()}" for key in data.input_key.split(";")] if data.input_key else sorted(EXTENSIONS)
    target = ".json" if data.target_key else ".cls"
    archives, images, labels = _list_archives(data, _split_name(data, split)), [], []
    for number, archive in enumerate(archives):
        with open(archive, "rb") as file:
            for key, group in groupby(_read_members(archive), lambda member: _sample_key(member.path)):
                files = {member.path.name[len(PurePosixPath(key).name) :].lower(): member for member in group}
                image = next((files[extension] for extension in extensions if extension in files), None)
                label = files.get(target)
                if image is None or label is None:
                    raise UserError(
                        f"{archive}: sample {key} has {', '.join(sorted(files))}; it needs {', '.join(extensions)} "
                        f"beside {target}"
                    )
                file.seek(label.offset)
                images.append((number, image))
                labels.append(_read_label(file.read(label.size), data.target_key, f"{archive}:{label.path}"))
    return ArchiveDataset(archives, images, labels, data, numbered=True)


def _split_name(data: Tar, split: str) -> str:
    return (data.train_split if split == "train" else data.val_split) or split


def _list_archives(data: Tar, split: str) -> list[Path]:
    """ROOT/SPLIT.tar, else ROOT/SPLIT/*.tar, else the archives that match ROOT/SPLIT, sorted by name."""
    root = Path(data.root)
    if (single := root / f"{split}.tar").is_file():
        return [single]
    try:
        found = sorted([*root.glob(f"{split}/*.tar"), *(path for path in root.glob(split) if path.suffix == ".tar")])
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"archives {split} in {root} cannot be listed ({error})") from error
    if not found:
        raise UserError(
            f"there is neither {single} nor an archive {root / split}/*.tar; check data.root and data.train_split"
        )
    return found


def _read_members(archive: Path) -> Iterator[Member]:
    """The files of an uncompressed archive and of archives within it, in order. Raises UserError if it is damaged."""
    if not archive.is_file():
        raise UserError(f"archive {archive} is no regular file")
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
                            offset = member.offset_data + file.offset_data
                            name = PurePosixPath(member.name).stem
                            yield Member(PurePosixPath(file.name), offset, file.size, within=name)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"archive {archive} cannot be read ({error}); it must be a complete tar file without compression"
        ) from error


def _sample_key(path: PurePosixPath) -> str:
    return str(path.parent / path.name.partition(".")[0])


def _read_label(content: bytes, key: str | None, name: str) -> str:
    try:
        value = content.decode() if key is None else json.loads(content)[key]
        if len(text := str(value).strip()) > MAX_LABEL:
            raise ValueError(f"a class of {len(text)} letters")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{name} does not contain a class ({type(error).__name__}: {error}); check data.target_key"
        ) from error
    return text


TAR = SourceSpec(name="tar", summary="images in tar archives", options=Tar, datasets={"labels": open_tar})
WEBDATASET = SourceSpec(
    name="wds", summary="images in WebDataset archives", options=WebDataset, datasets={"labels": open_wds}
)
