"""Mistakes their reader can mend, and how a command tells of them."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake its reader can mend: the command line prints the message alone, without a traceback."""


class Lost(UserError):
    """What only the process that meets it can tell."""


@dataclasses.dataclass
class Outcome:
    """The exit code of a command."""

    code: int = 0


@contextmanager
def report_errors() -> Iterator[Outcome]:
    """Turn a UserError into one message on stderr, from rank 0 unless it is `Lost`, and a non-zero exit code."""
    outcome = Outcome()
    try:
        yield outcome
    except UserError as error:
        outcome.code = 1
        if os.environ.get("RANK", "0") == "0" or isinstance(error, Lost):
            print(f"error: {error}", file=sys.stderr)
