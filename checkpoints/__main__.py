"""`python -m tessel.checkpoints`: list, fetch, verify and convert published weights."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .manifest import Weight, find_weight, load_manifest
from .store import fetch_weight, read_state, sha256_of, verify, write_state


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; an error is one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next fetch resumes a broken download", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tessel.checkpoints", description="Published weights of the zoo.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "show the published weights: size, license, ImageNet-1K top-1, and whether they can be fetched"
    command = commands.add_parser("list", help=text, description=text)
    command.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="only these, such as 'cswin_*'")
    command.set_defaults(run=_list)

    text = "download a file into the cache, check it, and print where it is"
    command = commands.add_parser("fetch", help=text, description=text)
    command.add_argument("name", metavar="NAME", help="a row of `list`; without its tag the model's first row")
    command.add_argument(
        "--cache-dir", type=Path, help="default: $TESSEL_HOME/checkpoints, else the checkpoints of torch's hub folder"
    )
    command.set_defaults(run=_fetch)

    text = "print a file's sha256 and size, and compare it with the manifest"
    command = commands.add_parser("verify", help=text, description=text)
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--name", metavar="ROW", help="the row it must match; default: whichever row has its sha256")
    command.set_defaults(run=_verify)

    text = "convert a checkpoint between the published layout and ours, into a safetensors file"
    command = commands.add_parser("convert", help=text, description=text)
    command.add_argument("input", type=Path, metavar="IN", help="safetensors or PyTorch file")
    command.add_argument("output", type=Path, metavar="OUT", help="ends in .safetensors; never overwritten")
    command.add_argument("--model", required=True, metavar="NAME", help="registered model, or a row of `list`")
    command.add_argument("--to", choices=["tessel", "published"], default="tessel", help="default: %(default)s")
    command.add_argument("--state-key", metavar="KEY", help="entry of IN with the weights; default: that of the row")
    command.set_defaults(run=_convert)
    return parser


def _list(args: argparse.Namespace) -> None:
    weights = [weight for name, weight in load_manifest().items() if fnmatchcase(name, args.pattern)]
    if not weights:
        raise ValueError(f"no published weights match {args.pattern!r}; without a pattern all are listed")
    table = [("name", "size", "license", "published", "reproduced", "available"), *map(_cells, weights)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cells(weight: Weight) -> tuple[str, ...]:
    return (
        weight.name,
        f"{weight.size / 1e6:.1f} MB" if weight.size else "-",
        weight.license,
        "-" if weight.published_top1 is None else f"{weight.published_top1:.2f}",
        "-" if weight.reproduced_top1 is None else f"{weight.reproduced_top1:.2f}",
        "yes" if weight.url else f"no: {weight.why_no_url}",
    )


def _fetch(args: argparse.Namespace) -> None:
    weight = find_weight(args.name)
    _report(fetch_weight(weight, cache_dir=args.cache_dir), weight)


def _verify(args: argparse.Namespace) -> None:
    _report(args.file, find_weight(args.name) if args.name else None)


def _report(path: Path, weight: Weight | None) -> None:
    sha256 = sha256_of(path)
    print(f"file    {path}\nsha256  {sha256}\nsize    {path.stat().st_size}")
    if weight is None:
        same = [row.name for row in load_manifest().values() if row.sha256 == sha256]
        print(f"row     {', '.join(same) or 'none of the manifest has this sha256'}")
    elif weight.sha256:
        verify(path, weight.sha256)
        print(f"row     {weight.name}")
    else:
        print(f"row     {weight.name} has no sha256 yet to compare with")


def _convert(args: argparse.Namespace) -> None:
    model, _, tag = args.model.partition(".")
    state_key = args.state_key
    if state_key is None:
        state_key = find_weight(args.model).state_key if tag and args.to == "tessel" else ""
    state = read_state(args.input, state_key=state_key)
    # imported here alone: this room knows no model
    zoo = importlib.import_module("tessel.zoo")
    convert = zoo.from_published if args.to == "tessel" else zoo.to_published
    state = convert(model, state)
    write_state(state, args.output)
    print(f"{args.output}: {len(state)} tensors of {model} in the {args.to} layout")


if __name__ == "__main__":
    sys.exit(main())
