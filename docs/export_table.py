"""Measure which family exports to which format, and write the table in docs/export.md.

    python docs/export_table.py                    write the table from docs/export.json
    python docs/export_table.py --measure [NAME...] [--only TITLE...]   measure first: all models, or those named
    python docs/export_table.py --published NAME... [--sizes fixed|open]   measure these models at their published size

A cell is the largest difference from PyTorch relative to the largest logit, over all inputs tried, or the reason why
there is none. Every cell is measured with random weights in which no branch is zero, on the smallest model of a family.
A cell that was not measured has a dash. A second table has models of the papers in ONNX, with fixed and open sizes.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from filelock import FileLock
from generated import rewritten
from torch import nn

import tessel.zoo
from tessel.export import export
from tessel.export.errors import first_line

PAGE = Path(__file__).resolve().parent / "export.md"
RECORD = PAGE.with_name("export.json")


class Cell(NamedTuple):
    """A column of the table: a format and what it leaves open."""

    format: str
    dynamic: tuple[str, ...]


CELLS = {
    "ONNX": Cell("onnx", ()),
    "ONNX, batch": Cell("onnx", ("batch",)),
    "ONNX, batch and size": Cell("onnx", ("batch", "size")),
    "torch.export, batch and size": Cell("torch-export", ("batch", "size")),
    "TorchScript, batch": Cell("torchscript-trace", ("batch",)),
    "AOTInductor": Cell("aoti", ()),
    "AOTInductor, batch and size": Cell("aoti", ("batch", "size")),
    "OpenVINO": Cell("openvino", ()),
    "OpenVINO, batch and size": Cell("openvino", ("batch", "size")),
    "ExecuTorch": Cell("executorch", ()),
}

PUBLISHED = {"fixed": (), "open": ("batch", "size")}


def perturbed(name: str) -> nn.Module:
    """The model with random weights and statistics, so that branches which start at zero count."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.05 * torch.rand_like(buffer))
    return model


def measure(name: str, title: str, folder: Path) -> dict[str, Any]:
    """The error of one cell. Raises ExportError if it does not work."""
    format, dynamic = CELLS[title]
    example = torch.randn(2, 3, 96, 128)
    report = export(perturbed(name), folder / "model", format, example=example, dynamic=dynamic)
    return {"error": float(f"{report.error:.1e}")}


def measure_published(name: str, title: str, folder: Path) -> dict[str, Any]:
    """ONNX of a model at the size of its configuration: the error of each size, and the size of the file."""
    report = export(perturbed(name), folder / "model", "onnx", dynamic=PUBLISHED[title])
    errors = {"x".join(map(str, shape)): float(f"{error:.1e}") for shape, error in report.errors.items()}
    return {"errors": errors, "megabytes": round(report.size / 1e6)}


# parts of errors that say little, and what they mean
EXPLANATIONS = {
    "ONNXRuntimeError": (
        "ONNX Runtime stops at images of another size than the example's, so the file is refused. Leave sizes fixed."
    ),
    "unconverted_ops_report": "OpenVINO has no conversion rule for an operator of the program.",
    "Failed to load method forward, error: 0x:14": (
        "ExecuTorch's runtime has no kernel of `sort`, by which these models select pixels."
    ),
    "Guard failed": (
        "torch.export decides by the size of the example whether a map has more than one window, and the file is "
        "refused. Leave only the batch open, or use ONNX, whose graph has no such condition."
    ),
}


def explained(reason: str) -> str:
    return next((text for part, text in EXPLANATIONS.items() if part in reason), reason)


def table() -> str:
    cells = json.loads(RECORD.read_text())["cells"]
    lines = ["| model | " + " | ".join(CELLS) + " |", "|---" * (len(CELLS) + 1) + "|"]
    reasons: list[str] = []
    for name, row in cells.items():
        found = []
        for title in CELLS:
            cell = row.get(title)
            if cell is None:
                found.append("-")
            elif "error" in cell:
                found.append(f"{cell['error']:.0e}")
            else:
                reason = explained(cell["reason"])
                if reason not in reasons:
                    reasons.append(reason)
                found.append(f"no ({reasons.index(reason) + 1})")
        lines.append(f"| `{name}` | " + " | ".join(found) + " |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def published_table() -> str:
    record = json.loads(RECORD.read_text())["published"]
    lines = ["| model | file, MB | fixed batch and size | open batch and size, at each size |", "|---|---|---|---|"]
    for name, row in sorted(record.items()):
        size = max((cell.get("megabytes", 0) for cell in row.values()), default=0)
        fixed, opened = (published_cell(row.get(title)) for title in PUBLISHED)
        lines.append(f"| `{name}` | {size or '-'} | {fixed} | {opened} |")
    return "\n".join(lines)


def published_cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if "reason" in cell:
        return f"no: {explained(cell['reason'])}"
    return ", ".join(f"{shape}: {error:.0e}" for shape, error in cell["errors"].items())


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino", "executorch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def record() -> Iterator[dict[str, Any]]:
    """The record, to be changed in place; several processes may do so."""
    with FileLock(Path(tempfile.gettempdir()) / "tessel-export-table.lock"):
        content = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        content = {"cells": {}, "published": {}} | content
        # of a package that is not installed here, the version that measured its cells
        content["versions"] = content.get("versions", {}) | versions()
        yield content
        RECORD.write_text(json.dumps(content, indent=1) + "\n")


def enter(name: str, title: str, cell: dict[str, Any], names: list[str]) -> None:
    """Write one cell into the record."""
    with record() as content:
        cells = content["cells"]
        cells.setdefault(name, {})[title] = cell
        rows = {name: cells.get(name, {}) for name in names}
        content["cells"] = {name: {title: row[title] for title in CELLS if title in row} for name, row in rows.items()}


def measured(measure: Callable[[str, str, Path], dict[str, Any]], name: str, title: str) -> dict[str, Any]:
    """The cell, or the reason why there is none; also printed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cell = measure(name, title, Path(folder))
        except Exception as error:
            cell = {"reason": first_line(error)}
    print(f"{name}, {title}: {cell} after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", metavar="NAME", help="measure these models, by default all")
    parser.add_argument("--only", nargs="+", metavar="TITLE", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--published", nargs="+", metavar="NAME", default=[], help="measure these at published size")
    parser.add_argument("--sizes", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED), help="of --published")
    options = parser.parse_args()
    names = [name for name in tessel.zoo.list_models() if name.endswith("_atto")]
    if options.measure is not None:
        for title in options.only:
            for name in options.measure or names:
                enter(name, title, measured(measure, name, title), names)
    for name in options.published:
        for title in options.sizes:
            cell = measured(measure_published, name, title)
            with record() as content:
                content["published"].setdefault(name, {})[title] = cell
    PAGE.write_text(rewritten(PAGE.read_text(), {"exports": table, "published_exports": published_table}))


if __name__ == "__main__":
    main()
