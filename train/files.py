"""Atomic writes: after a crash a file or folder is complete, or as it was before."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import NewerFormatError, UserError, one_line


def check_format(content: Mapping[str, Any], newest: int, name: Path | str) -> int:
    """The format number of a file's content; 1 if it has none. Raises NewerFormatError, which calls the file `name`."""
    written = content.get("format", 1)
    if not isinstance(written, int) or written > newest:
        raise NewerFormatError(
            f"{name} has format {written!r:.20}, written by tessel {content.get('tessel')!s:.20}; this version reads "
            f"formats up to {newest}: upgrade tessel"
        )
    return written


@contextmanager
def damaged_file(path: Path, remedy: str) -> Iterator[None]:
    """Turn what the block, which reads the file at `path`, raises for damaged content into a UserError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error, 120)}); {remedy}") from error


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError raised in the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        remedy = "free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its permissions"
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            remedy = "a part of this path is a file: remove it"
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); {remedy} or set run.out to another folder"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`: written to a temporary file, synced to disk, then renamed."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces the folder `path` at the end of the block.

    If the block raises, the temporary folder is deleted and `path` stays as it was.
    """
    part = path.with_name(f".tmp-{path.name}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
