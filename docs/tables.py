"""Write the generated tables of README.md, docs/models.md and docs/heads.md.

    python docs/tables.py [--check]    --check: only compare them with the files

The data come from the registry (parameters and multiply-adds are counted on the meta device), from the manifest of
published weights, and from the results of benchmarks/dense.py. A table stands between `<!-- table: NAME -->` and
`<!-- end -->`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
from generated import main

import tessel.zoo
from tessel.checkpoints import load_manifest

ROOT = Path(__file__).resolve().parent.parent
NONE = "its authors published none"
PAGES = (ROOT / "README.md", ROOT / "docs" / "models.md", ROOT / "docs" / "heads.md")
HEADS = {
    "fpn": "FPNHead", "freqfusion": "FPNHead on FreqFusion", "pem": "PEM", "mask2former": "Mask2Former", "fcos": "FCOS",
    "rtdetrv2": "RT-DETRv2", "d_fine": "D-FINE", "deformable_detr": "Deformable DETR",
}  # fmt: skip


def cost(name: str) -> tuple[float, float, int]:
    """Parameters in millions, multiply-adds in billions, and the side of the input that these are counted at."""
    tag = timm.get_pretrained_cfg(name).tag
    found = tessel.zoo.model_cost(f"{name}.{tag}" if tag and "." not in name else name)
    return found.parameters / 1e6, found.macs / 1e9, found.input_size[-1]


def families() -> str:
    """One line per paper: its title, models, range of sizes and link."""
    papers: dict[str, list[Any]] = {}
    for family in tessel.zoo.list_families():
        papers.setdefault(family.pretrained_cfg["paper_ids"].removeprefix("arXiv:"), []).append(family)
    lines = ["| family | models | parameters | paper |", "|---|---|---|---|"]
    for paper, found in papers.items():
        published = [[name for name in family.variants if not name.endswith("_atto")] for family in found]
        sizes = [cost(name)[0] for names in published for name in names]
        title = sys.modules[found[0].build.__module__].__doc__.strip().splitlines()[0].rstrip(".")
        span = f"{min(sizes):.1f} - {max(sizes):.1f} M"
        listed = ", ".join(f"`{_braces(names)}`" for names in published)
        lines.append(f"| {title} | {listed} | {span} | [{paper}](https://arxiv.org/abs/{paper}) |")
    return "\n".join(lines)


def _braces(names: list[str]) -> str:
    """Names with their common beginning in front of braces, as a shell expands them: `cswin_{tiny,small}`."""
    start = os.path.commonprefix(names).rpartition("_")[0]
    return f"{start}_{{{','.join(name.removeprefix(start + '_') for name in names)}}}" if len(names) > 1 else names[0]


def models() -> str:
    """One line per published checkpoint, and one per model that has none."""
    head = "| model | parameters (M) | GMACs | input | published top-1 | ours | license | weights |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    reported = {name: paper for family in tessel.zoo.list_families() for name, paper in family.reported.items()}
    for name in tessel.zoo.list_models():
        weights = [w for w in load_manifest().values() if w.model == name]
        for w in weights:
            top1, ours = (f"{x:.1f}" if x else "" for x in (w.published_top1, w.reproduced_top1))
            source = f"[file]({w.url})" if w.url else f"none: {w.why_no_url}"
            lines.append(f"{_begin(w.name)} {top1} | {ours} | {w.license} | {source} |")
        if not weights:
            top1 = reported.get(name, (None, None))[1] or ""
            lines.append(f"{_begin(name)} {top1} | | | none: {'a test model' if '_atto' in name else NONE} |")
    return "\n".join(lines)


def _begin(name: str) -> str:
    parameters, macs, size = cost(name)
    return f"| `{name}` | {parameters:.2f} | {macs:.2f} | {size} |"


def heads() -> str:
    """One line per head and backbone of benchmarks/results/heads_cpu.json, and what they were measured with."""
    results = json.loads((ROOT / "benchmarks" / "results" / "heads_cpu.json").read_text())
    found = {(row["task"], row["model"], row["pass"]): row for row in results["rows"]}
    head = ("head", "backbone", "pixels", "parameters (M)", "GMACs", "inference", "training", "memory (GiB)", "loss")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, title in HEADS.items():
        for name in dict.fromkeys(row["model"] for row in results["rows"]):
            count, inference, training = (
                found.get((task, name, part), {}) for part in ("count", "inference", "training")
            )
            cells = (
                title,
                f"`{name}`",
                f"{count['height']} x {count['width']}",
                f"{count['parameters']:.1f}",
                f"{count['gmacs']:.1f}",
                _cell("{:.2f}", inference.get("images_per_second")),
                _cell("{:.3f}", training.get("images_per_second")),
                _cell("{:.1f}", training.get("peak_mib", 0) / 1024),
                _cell("{:.1%}", training.get("loss_share")),
            )
            lines.append("| " + " | ".join(cells) + " |")
    clock = {"cpu": "images per second of CPU time", "wall": "images per second"}[results["clock"]]
    timed: dict[str, dict[str, None]] = {}  # an ordered set for each device
    for row in results["rows"]:
        if row["pass"] != "count":
            timed.setdefault(row["device"], {})[f"{row['pass']} of {HEADS[row['task']]}"] = None
    *others, most = sorted(timed, key=lambda device: len(timed[device]))
    where = "; ".join([most, *(f"{', '.join(timed[device])}: {device}" for device in others)])
    how = f"torch {results['torch']}, two images at a time; inference and training: {clock}"
    return "\n".join([*lines, "", f"Measured with {how}. Device: {where}."])


def _cell(form: str, value: float | None) -> str:
    """Empty for what was not measured."""
    return form.format(value) if value else ""


TABLES = {"families": families, "models": models, "heads": heads}


if __name__ == "__main__":
    sys.exit(main(__doc__, PAGES, TABLES))
