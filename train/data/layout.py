"""PLACEHOLDER train/data/layout.py"""

from pathlib import Path

from ..errors import UserError

LISTED = 20  # missing files, at most


MISSING = "; the folder must be as it comes out of the published archive"


def inside(root: Path, folder: str, sign: str) -> Path:
    """`root`, or the folder in it that archives unpack to."""
    return root / folder if not (root / sign).is_dir() and (root / folder / sign).is_dir() else root


def _files(folder: Path, pattern: str, root: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"data.root={root} lacks the folder {folder.relative_to(root)}{MISSING}")
    if not (found := sorted(folder.glob(pattern))):
        raise UserError(f"{folder} holds no {pattern}{MISSING}")
    return found


def _present(paths: list[Path], kind: str) -> list[Path]:
    """`paths`, all of which are there: a training must not come upon a missing file hours later."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        listed = ", ".join(missing[:LISTED]) + ", ..." * (len(missing) > LISTED)
        raise UserError(f"{len(missing)} of {len(paths)} {kind} are missing: {listed}{MISSING}")
    return paths
