"""Generates tables in pages; a table stands between `<!-- table: NAME -->` and `<!-- end -->`."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def rewritten(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Replace every table in `text` by a newly generated one."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{tables[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main(description: str | None, pages: Iterable[Path], tables: Mapping[str, Callable[[], str]]) -> int:
    """Rewrite the pages; with --check change nothing and return 1 if a page is out of date."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is out of date")
    options = parser.parse_args()
    stale = []
    for page in pages:
        before = page.read_text()
        after = rewritten(before, tables)
        if after != before:
            stale.append(page.name)
            if not options.check:
                page.write_text(after)
    print("out of date: " + ", ".join(stale) + " (make tables)" if stale else "all tables are current")
    return int(bool(stale) and options.check)
