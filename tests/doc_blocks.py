"""Run the Python blocks of a page from top to bottom in one session: `python tests/doc_blocks.py PAGE`."""

import sys
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def run_blocks(page: Path) -> None:
    for example in Sybil([PythonCodeBlockParser(), SkipParser()]).parse(page).examples():
        with suppress(SkipTest):
            example.evaluate()


if __name__ == "__main__":
    run_blocks(Path(sys.argv[1]))
