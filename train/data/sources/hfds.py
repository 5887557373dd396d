"""`data.source=hfds`: a Hugging Face dataset, by timm's reader."""

from typing import Any

from pydantic.dataclasses import dataclass

from ...errors import UserError, one_line
from ...recipe.registry import SourceSpec
from ...recipe.schema import STRICT, FilePath, Source
from ..class_map import read_class_map
from ..external import READER_ERRORS, ExternalDataset, require_package


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExternalData(Source):
    name: str
    """name of the dataset; with hfds also a local folder"""
    root: FilePath | None = None
    """folder in which the library stores its datasets; null: the library's default"""
    train_split: str | None = None
    """split to train on; null: train"""
    val_split: str | None = None
    """split to evaluate on; null: validation"""
    input_key: str | None = None
    """column of the images; null: image"""
    target_key: str | None = None
    """column of the classes; null: label"""
    class_map: FilePath | None = None
    """text file with one class per line; null: the classes that the dataset declares"""

    def split(self, split: str) -> str:
        """Name of the "train" or "val" split in the dataset."""
        return (self.train_split or "train") if split == "train" else (self.val_split or "validation")


def open_hfds(data: ExternalData, split: str) -> ExternalDataset:
    """A split of a Hugging Face dataset. Raises UserError if it cannot be read."""
    require_package("data.source=hfds", "datasets", "datasets")
    from timm.data import create_reader

    columns = {"input_key": data.input_key, "target_key": data.target_key}
    mapping = {name: index for index, name in enumerate(read_class_map(data))} if data.class_map else None
    name = f"split {data.split(split)} of {data.name}"
    try:
        reader: Any = create_reader(
            f"hfds/{data.name}", root=data.root, split=data.split(split), class_map=mapping, **columns
        )
        named = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        classes = named or [str(number) for number in range(1 + max(map(int, reader.iter_targets())))]
    except READER_ERRORS as error:
        raise UserError(f"data.source=hfds: {name} cannot be read: {one_line(error)}") from error
    return ExternalDataset(reader.__getitem__, len(reader), classes, name)


SPEC = SourceSpec(
    name="hfds",
    summary="a Hugging Face dataset",
    options=ExternalData,
    datasets={"labels": open_hfds},
)
