"""`tessel weights`, also `python -m tessel.checkpoints`: list, download, check and convert published weights."""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .manifest import (
    DenseWeight,
    Weight,
    WeightFile,
    find_dense_weight,
    find_weight,
    load_dense_manifest,
    load_manifest,
)
from .store import fetch_weight, imported_path, read_state, sha256_of, unknown_of, verify, write_state


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; errors are printed as one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; `fetch` resumes the download if the server allows it", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tessel weights", description="Published weights of tessel's models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = (
        "list the published weights of classifiers, with their ImageNet-1K top-1, and of the segmenters and detectors "
        "that recipes build: size, license, and whether they can be downloaded"
    )
    command = commands.add_parser("list", help=text, description=text)
    command.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="list only matching names, such as 'cswin_*', 'coco/*'",
    )
    command.add_argument("--json", action="store_true", help="print all fields of the manifest as JSON")
    command.set_defaults(run=_list)

    text = "download a file to the cache, check its sha256, and print its path"
    command = commands.add_parser("fetch", help=text, description=text)
    command.add_argument(
        "name", metavar="NAME", help="a name that `list` prints; without a tag, the model's first weights"
    )
    command.add_argument(
        "--cache-dir", type=Path, help="default: $TESSEL_HOME/checkpoints, else `checkpoints` in torch's hub folder"
    )
    command.set_defaults(run=_fetch)

    text = "print a file's sha256 and size, and compare it with the manifest"
    command = commands.add_parser("verify", help=text, description=text)
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--name", metavar="NAME", help="compare with these weights; default: search for its sha256")
    command.set_defaults(run=_verify)

    text = "convert the keys of a checkpoint from published to tessel's or back, and write a safetensors file"
    command = commands.add_parser("convert", help=text, description=text)
    command.add_argument("input", type=Path, metavar="IN", help="safetensors or PyTorch file")
    command.add_argument(
        "output", type=Path, metavar="OUT", help="must end in .safetensors; an existing file is not overwritten"
    )
    command.add_argument("--model", required=True, metavar="NAME", help="a model, or a name that `list` prints")
    command.add_argument(
        "--to", choices=["tessel", "published"], default="tessel", help="keys of OUT (default: %(default)s)"
    )
    command.add_argument(
        "--state-key", metavar="KEY", help="entry of IN that holds the weights; default: the manifest's"
    )
    command.set_defaults(run=_convert)
    return parser


def _list(args: argparse.Namespace) -> None:
    weights = [weight for name, weight in _all_weights().items() if fnmatchcase(name, args.pattern)]
    if not weights:
        raise ValueError(f"no published weights match {args.pattern!r}; without a pattern all are listed")
    if args.json:
        print(json.dumps([dataclasses.asdict(weight) for weight in weights], indent=1))
        return
    table = [("name", "size", "license", "metric", "published", "reproduced", "available"), *map(_cells, weights)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _all_weights() -> dict[str, Weight | DenseWeight]:
    return {**load_manifest(), **load_dense_manifest()}


def _find(name: str) -> Weight | DenseWeight:
    """The row of a classifier, or of the recipe of a segmenter or detector."""
    return find_dense_weight(name) if "/" in name else find_weight(name)


def _cells(weight: Weight | DenseWeight) -> tuple[str, ...]:
    if isinstance(weight, DenseWeight):
        metric, published, reproduced = weight.metric, weight.published, weight.reproduced
    else:
        metric, published, reproduced = "top-1", weight.published_top1, weight.reproduced_top1
    return (
        weight.name,
        f"{weight.size / 1e6:.1f} MB" if weight.size else "-",
        weight.license,
        metric,
        "-" if published is None else f"{published:.2f}",
        "-" if reproduced is None else f"{reproduced:.2f}",
        "imported" if imported_path(weight).is_file() else "yes" if weight.url else f"no: {weight.why_no_url}",
    )


def _fetch(args: argparse.Namespace) -> None:
    weight = _find(args.name)
    _report(fetch_weight(weight, cache_dir=args.cache_dir), weight)


def _verify(args: argparse.Namespace) -> None:
    _report(args.file, _find(args.name) if args.name else None)


def _report(path: Path, weight: WeightFile | None) -> None:
    sha256 = sha256_of(path)
    print(f"file    {path}\nsha256  {sha256}\nsize    {path.stat().st_size}")
    if weight is None:
        same = [row.name for row in _all_weights().values() if row.sha256 == sha256]
        print(f"weights {', '.join(same) or 'no weights in the manifest have this sha256'}")
        if not same:
            _report_unknown(path)
    elif path.name == imported_path(weight).name:
        print(f"weights {weight.name}, imported, with tessel's keys")
    elif weight.sha256:
        verify(path, weight.sha256)
        print(f"weights {weight.name}")
    else:
        print(f"weights {weight.name}, whose sha256 is not in the manifest yet")
        _report_unknown(path)


def _report_unknown(path: Path) -> None:
    """Say what was not verified of a file that no sha256 vouches for."""
    print("unknown whether this is the file that its authors published: there is no sha256 to compare it with")
    try:
        for sentence in unknown_of(path):
            print(f"unknown {sentence}")
    except ValueError as error:
        print(f"unusable {error}")


def _convert(args: argparse.Namespace) -> None:
    model, _, tag = args.model.partition(".")
    state_key = args.state_key
    if state_key is None:
        state_key = find_weight(args.model).state_key if tag and args.to == "tessel" else ""
    state = read_state(args.input, state_key=state_key)
    # the only import of models; the rest of this package does not know them
    zoo = importlib.import_module("tessel.zoo")
    convert = zoo.from_published if args.to == "tessel" else zoo.to_published
    state = convert(model, state)
    write_state(state, args.output)
    print(f"{args.output}: {len(state)} tensors of {model} with {args.to} keys")


if __name__ == "__main__":
    sys.exit(main())
