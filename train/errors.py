"""Mistakes their reader can mend, and how a command tells of them."""

import dataclasses
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

WORKER_DIED = (
    "a loader process died, as it does where memory is short; data.workers takes fewer of them. "
    "The same command goes on from the last checkpoint"
)


class UserError(ValueError):
    """A mistake its reader can mend: the command line prints the message alone, without a traceback."""


class LocalRankError(UserError):
    """What only the process that meets it can tell."""


@dataclasses.dataclass
class Outcome:
    """The exit code of a command."""

    code: int = 0


@contextmanager
def report_errors() -> Iterator[Outcome]:
    """Turn a UserError into one message on stderr, from rank 0 unless it is `LocalRankError`, and a non-zero exit code."""
    outcome = Outcome()
    try:
        yield outcome
    except UserError as error:
        outcome.code = 1
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LocalRankError):
            print(f"error: {error}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """What an error of another library says, shortened to a line; of a bare assertion, what was asserted."""
    text = textwrap.shorten(str(error), 300, placeholder=" ...")
    if isinstance(error, LookupError):  # whose words alone are none to understand
        return f"{type(error).__name__}: {text}"
    if not text and isinstance(error, AssertionError):
        text = next((frame.line or "" for frame in reversed(traceback.extract_tb(error.__traceback__))), "")
    return text or type(error).__name__
