"""Errors that a user can fix, and how a command prints them."""

import dataclasses
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

WORKER_DIED = (
    "a loader process died, usually because the machine ran out of memory; lower data.workers. "
    "The same command continues from the last checkpoint"
)


class UserError(ValueError):
    """An error in the recipe, the data or the environment. Commands print its message without a traceback."""


class FaultsError(UserError):
    """A UserError about several faults. `faults` has a sentence for each; the message may leave some out."""

    def __init__(self, message: str, faults: Sequence[str]):
        super().__init__(message)
        self.faults = list(faults)


class NewerFormatError(UserError):
    """A file was written by a later version of tessel. It is not damaged: the remedy is to upgrade."""


class LocalRankError(UserError):
    """A UserError that only one process knows of. That process prints it; any other UserError is printed by rank 0."""


@dataclasses.dataclass
class Outcome:
    """The exit code of a command, set by `report_errors`."""

    code: int = 0


@contextmanager
def report_errors() -> Iterator[Outcome]:
    """Catch a UserError, print its message to stderr and set the exit code to 1.

    On several processes rank 0 prints; a `LocalRankError` is printed by the process that raised it. Ctrl-C is one
    line too.
    """
    outcome = Outcome()
    try:
        yield outcome
    except UserError as error:
        outcome.code = 1
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LocalRankError):
            print(f"error: {printable(str(error))}", file=sys.stderr)
    except KeyboardInterrupt:
        outcome.code = 130
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, and bytes that are no UTF-8 as escapes."""
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


def one_line(error: BaseException, width: int = 300) -> str:
    """The message of another library's exception, shortened to one line of at most `width` characters.

    A LookupError gets its class name in front, because its message is often only the missing key. An assertion
    without a message gives the source line that failed.
    """
    text = textwrap.shorten(str(error), width, placeholder=" ...")
    if isinstance(error, LookupError):
        return f"{type(error).__name__}: {text}"
    if not text and isinstance(error, AssertionError):
        text = next((frame.line or "" for frame in reversed(traceback.extract_tb(error.__traceback__))), "")
    return text or type(error).__name__
