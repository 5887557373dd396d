"""Reading a directory of torch.distributed.checkpoint (DCP) without running code that it may contain.

DCP unpickles two kinds of content without limits: the file `.metadata`, and every value that is not a tensor, such as
a learning rate. Whoever writes a checkpoint writes its sha256 too, so that is no protection. Here `.metadata` is
unpickled to records that only hold data, from which DCP's own objects are made, and values are read by torch's
unpickler for plain data.
"""

import pickle
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata, ReadItem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

RECORDS = {
    f"torch.distributed.checkpoint.{name}"
    for name in (
        "metadata.BytesStorageMetadata",
        "metadata.ChunkStorageMetadata",
        "metadata.Metadata",
        "metadata.MetadataIndex",
        "metadata.StorageMeta",
        "metadata.TensorProperties",
        "metadata.TensorStorageMetadata",
        "filesystem._StorageInfo",
    )
}
# named in `.metadata`, and not needed: the memory layout of tensors, and the folder in which they were written
UNUSED = {"torch.serialization._get_layout", "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"}


class PlainReader(FileSystemReader):
    """DCP's reader of a directory, which runs no code of the file `.metadata`."""

    def __init__(self, path: Path):
        """Raises UnpicklingError if `.metadata` is damaged, or names anything but what DCP writes."""
        super().__init__(path)
        try:
            with open(path / ".metadata", "rb") as file:
                self.metadata = _metadata(_Unpickler(file).load())
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # a damaged pickle can fail in any way, also by asking for memory
            raise pickle.UnpicklingError(f"its .metadata is damaged ({type(error).__name__})") from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class PlainPlanner(DefaultLoadPlanner):
    """DCP's planner, which runs no code of values that are not tensors."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        name, plain = read_item.dest_index.fqn, BytesIO()
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except Exception as error:  # a damaged pickle can fail in any way
            raise pickle.UnpicklingError(f"its value {name} is damaged or no plain data; no code was run") from error
        super().load_bytes(read_item, BytesIO(plain.getvalue()))


class _Record:
    """An object of one of DCP's classes, as the pickle describes it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole in RECORDS:
            return _Record
        if whole == "torch.Size":
            return tuple
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if whole in UNUSED or module.partition(".")[0] == "pathlib":
            return lambda *values: None
        raise pickle.UnpicklingError(f"its .metadata would call {whole:.80}; no code was run")


def _metadata(record: Any) -> Metadata:
    """DCP's object of a record; a record of another shape raises an exception of any kind."""
    state = record.state
    return Metadata(
        state_dict_metadata={str(name): _entry(entry) for name, entry in state["state_dict_metadata"].items()},
        planner_data=state["planner_data"],
        storage_meta=StorageMeta(),
        version=state.get("version"),
        storage_data={_index(index): _place(place) for index, place in state["storage_data"].items()},
    )


def _entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    state = vars(record).get("state", {})
    if "size" not in state:
        return BytesStorageMetadata()
    chunks = [ChunkStorageMetadata(_size(one.state["offsets"]), _size(one.state["sizes"])) for one in state["chunks"]]
    return TensorStorageMetadata(TensorProperties(state["properties"].state[0]), _size(state["size"]), chunks)


def _index(record: Any) -> MetadataIndex:
    name, offset, hint = (record.state.get(key) for key in ("fqn", "offset", "index"))
    return MetadataIndex(str(name), None if offset is None else _size(offset), hint)


def _place(record: Any) -> _StorageInfo:
    path, offset, length = (record.state[name] for name in ("relative_path", "offset", "length"))
    if PurePath(path).name != path:
        raise pickle.UnpicklingError(f"its .metadata names a file in another folder: {path!r:.80}")
    return _StorageInfo(path, int(offset), int(length))


def _size(numbers: Any) -> torch.Size:
    return torch.Size([int(number) for number in numbers])
