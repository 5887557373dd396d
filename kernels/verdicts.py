"""Verdicts of `python -m tessel.kernels verify`: which operators run faster in their Triton kernels on this device.

A verdict is a JSON file in the folder `kernels` of $TESSEL_HOME, else of torch's hub folder. It counts for one device
and one version of driver, torch, triton and tessel: its environment. Verdicts in the folder `verdicts` of this package
count where the user has none.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__

FORMAT = 1
VERIFY = "python -m tessel.kernels verify"
logger = logging.getLogger("tessel")
enabled = True  # False: `fastest` answers `plain`, so that `verify` can time what `auto` runs without a verdict


@dataclass(frozen=True)
class Judgment:
    """Whether the Triton kernels are right and fast for one operator, class of shapes, dtype and direction.

    fastest: `triton` or `plain` where the model runs eagerly; compiled: the same under torch.compile. microseconds: the
    median time of each implementation, by case; reason: why the kernels are not taken, or empty.
    """

    operator: str
    shape_class: str
    dtype: str
    direction: str
    fastest: str
    compiled: str
    correct: bool
    reason: str
    microseconds: Mapping[str, Mapping[str, float]]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.operator, self.shape_class, self.dtype, self.direction


class InvalidVerdictError(ValueError):
    """A verdict file that cannot be used; the message says why."""


def environment(device: str) -> dict[str, str]:
    """What a verdict depends on. device: `cuda`, or `cpu` for Triton's interpreter."""
    found = {"device": "interpreter", "driver": "none"}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
        found = {"device": name, "driver": f"{torch.version.cuda or torch.version.hip}, {_driver()}"}
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {**found, "torch": torch.__version__, "triton": triton, "tessel": __version__}


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text("utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        return "unknown driver"


def folder() -> Path:
    """The folder of the user's verdicts."""
    return Path(os.environ.get("TESSEL_HOME") or torch.hub.get_dir(), "kernels").expanduser()


def file_name(found: Mapping[str, str]) -> str:
    """The name of the verdict of an environment."""
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return f"verdict-{digest[:16]}.json"


def write(found: Mapping[str, str], judgments: Iterable[Judgment]) -> Path:
    """Replace the user's verdict of an environment; returns its file."""
    path = folder() / file_name(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"format": FORMAT, "environment": dict(found), "judgments": [asdict(one) for one in judgments]}
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1), "utf-8")
    os.replace(part, path)
    load.cache_clear()
    return path


def read(path: Any, found: Mapping[str, str]) -> list[Judgment]:
    """The judgments in a file. Raises InvalidVerdictError if it is damaged, foreign or of another version."""
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            raise InvalidVerdictError(f"its format is {record['format']}, this version reads {FORMAT}")
        written = record["environment"]
        if other := [f"{written.get(key)} instead of {found[key]}" for key in found if written.get(key) != found[key]]:
            raise InvalidVerdictError(f"it was made with {', '.join(other)}")
        judgments = [Judgment(**one) for one in record["judgments"]]
        if any({one.fastest, one.compiled} - {"triton", "plain"} for one in judgments):
            raise InvalidVerdictError("it names an unknown implementation")
    except InvalidVerdictError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidVerdictError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return judgments


def find(device: str) -> tuple[Any, list[Judgment]] | None:
    """The file and the judgments of this environment, the user's before the package's; None without one.

    A file that cannot be used is named in a warning.
    """
    found = environment(device)
    for path in (folder() / file_name(found), Path(__file__).parent / "verdicts" / file_name(found)):
        if path.is_file():
            try:
                return path, read(path, found)
            except InvalidVerdictError as error:
                logger.warning("the verdict in %s is ignored: %s; `%s` makes a new one", path, error, VERIFY)
    return None


@lru_cache
def load(device: str) -> Mapping[tuple[str, str, str, str], Judgment]:
    """The judgments by operator, class of shapes, dtype and direction. Without a verdict says once how to get one."""
    found = find(device)
    if found is None:
        if device == "cuda":
            logger.warning("attention runs in plain PyTorch; `%s` tries whether Triton kernels are faster", VERIFY)
        return {}
    return {one.key: one for one in found[1]}


def fastest(device: str, operator: str, shape_class: str, dtype: str, direction: str, compiling: bool) -> str:
    """`triton` or `plain`, the implementation to take; `plain` for what was not judged."""
    judgment = load(device).get((operator, shape_class, dtype, direction)) if enabled else None
    if judgment is None or not judgment.correct:
        return "plain"
    return judgment.compiled if compiling else judgment.fastest


# A compiled graph keeps the answer, as it keeps every choice of a backend. This is what
# torch.compiler.assume_constant_result does, which would import the compiler: seconds.
fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]
