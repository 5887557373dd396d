"""Finding the files of a data set in a published folder layout."""

from pathlib import Path

from ..errors import FaultsError, UserError

MAX_LISTED = 20  # missing files in one message
UNPACK_HINT = "; unpack the published archive without changes, or choose another data.source for own files"


def unpacked_root(root: Path, folder: str, marker: str) -> Path:
    """`root`, or `root/folder` if only that one contains `marker`: archives unpack to a folder of their own."""
    return root / folder if not (root / marker).is_dir() and (root / folder / marker).is_dir() else root


def list_files(folder: Path, pattern: str, root: Path) -> list[Path]:
    """The files in `folder` that match, sorted. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"data.root={root} has no folder {folder.relative_to(root)}{UNPACK_HINT}")
    if not (found := sorted(folder.glob(pattern))):
        raise UserError(f"{folder} has no files {pattern}{UNPACK_HINT}")
    return found


def check_exist(paths: list[Path], kind: str) -> list[Path]:
    """`paths`, unchanged. Raises UserError if one is missing, so that a training does not fail hours later."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        listed = ", ".join(missing[:MAX_LISTED]) + ", ..." * (len(missing) > MAX_LISTED)
        message = f"{len(missing)} of {len(paths)} {kind} are missing: {listed}{UNPACK_HINT}"
        raise FaultsError(message, [f"{path} is missing" for path in missing])
    return paths
