"""Write the generated tables of docs/recipes.md, or with --check say whether they are current.

    python docs/recipes.py [--check]

The keys come from the schema, the recipes from configs/imagenet, configs/ade20k and configs/coco: their settings from
the YAML, paper and accuracy from the comments they open with. A table stands between `<!-- table: NAME -->` and
`<!-- end -->`.
"""

import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

from generated import main

from tessel.checkpoints import load_dense_manifest
from tessel.train.recipe.explain import describe_type
from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.recipe.plan import plan
from tessel.train.recipe.registry import SOURCES, TASKS, SourceSpec, TaskSpec, key_groups
from tessel.train.recipe.sizing import sized

PAGE = Path(__file__).resolve().parent / "recipes.md"
IMAGENET = 1_281_167  # training images


def keys() -> str:
    """One table per group of keys: those of every recipe, of each task and of each data source."""
    tables = []
    for group, found in key_groups():
        lines = [f"### Keys of {group}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in found:
            value = "required" if key.default is dataclasses.MISSING else f"`{json.dumps(key.default)}`"
            kind = describe_type(key.hint).replace(" | ", ", ")
            lines.append(f"| `{key.name}` | {kind} | {value} | {key.description.replace('|', ', ')} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def registered() -> str:
    """One line per task and per data source."""
    lines = ["| task | what it is | data sources |", "|---|---|---|"]
    for task in TASKS.values():
        sources = (source.name for source in SOURCES.values() if reads(task, source))
        lines.append(f"| `{task.kind}` | {task.summary} | {', '.join(f'`{name}`' for name in sources)} |")
    lines += ["", "| data source | what it is |", "|---|---|"]
    lines += [f"| `{source.name}` | {source.summary} |" for source in SOURCES.values()]
    return "\n".join(lines)


def reads(task: TaskSpec, source: SourceSpec) -> bool:
    """Whether a task can read a data source with its default options."""
    return task.sample_kind(task.options()) in source.datasets


def heading(columns: str) -> list[str]:
    """The first two lines of a table, from names with commas between."""
    return [f"| {columns.replace(', ', ' | ')} |", "|---" * len(columns.split(", ")) + "|"]


def sizes() -> str:
    """What `auto` stands for in the fine-tuning recipes, on data sets of four sizes."""
    lines = heading("recipe, images, batch, epochs, updates, warm-up, evaluate every, log every, EMA decay")
    for name, images in itertools.product(("classify", "detect"), (60, 1_000, 20_000, 600_000)):
        recipe = sized(load_recipe(f"finetune/{name}", ["data.root=PATH"]), samples=images)
        steps = plan(recipe, samples=images, world_size=1)
        counts = f"{images:,} | {recipe.data.batch} | {recipe.sched.epochs:g} | {steps.steps:,} | {steps.warmup:,}"
        rates = f"{recipe.eval.every:,} | {recipe.log.every} | {recipe.ema.decay}"
        lines.append(f"| `finetune/{name}`{', `segment`' * (name == 'detect')} | {counts} | {rates} |")
    return "\n".join(lines)


def settings(head: str) -> str:
    """Whose settings a recipe has, by the comments it opens with."""
    unsure = re.search(r"^# unverified: (every|all)?", head, re.MULTILINE)
    return ("ours or stand-ins" if unsure[1] else "published in part") if unsure else "published"


def trained(folder: str, path: Path) -> str:
    """A link to the published weights of the whole model that a recipe trains, if they have one."""
    row = load_dense_manifest().get(f"{folder}/{path.stem}")
    return f"[file]({row.url})" if row else ""


def recipes() -> str:
    """One line a recipe for ImageNet-1K."""
    columns = "recipe, paper, input, epochs, batch, optimizer, peak lr, begins with, settings, published top-1, ours"
    lines = heading(columns)
    for path in sorted((PACKAGED / "imagenet").glob("*.yaml")):
        recipe, head = load_recipe(path), path.read_text()
        paper, top1 = re.search(r"arXiv (\d{4}\.\d{5})", head), re.search(r"top-1 ([\d.]+) % \(published", head)
        if not paper or not (top1 or "accuracy in the paper is not known to us" in head):
            raise SystemExit(f"{path} does not open with its paper and its published top-1")
        lr = plan(recipe, samples=IMAGENET, world_size=8).lr
        begin = f"`{recipe.model.init_from}`" if recipe.model.init_from else ""
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})"
        counts = f"{recipe.data.size} | {recipe.sched.epochs:g} | {recipe.data.batch}"
        rates = f"{recipe.optim.name} | {lr:g} | {begin} | {settings(head)} | {top1[1] if top1 else ''} | not run"
        lines.append(f"| `imagenet/{path.stem}` | {link} | {counts} | {rates} |")
    return "\n".join(lines)


def coco() -> str:
    """One line a recipe for COCO."""
    columns = "recipe, detector, schedule, optimizer, peak lr, decay, begins with, published box AP, mask AP"
    lines = heading(f"{columns}, trained model, ours")
    for path in sorted((PACKAGED / "coco").glob("*.yaml")):
        recipe, head = load_recipe(path), path.read_text()
        box, mask = (re.search(rf"^# expected: .*{kind} AP ([\d.]+)", head, re.MULTILINE) for kind in ("box", "mask"))
        if not (box or "not published with this head" in head):
            raise SystemExit(f"{path} does not open with its published box AP")
        begin = recipe.model.name if recipe.model.pretrained else str(recipe.model.init_from)
        decays = "/".join(f"{milestone:g}" for milestone in recipe.sched.milestones or ())
        schedule = f"{recipe.sched.epochs:g} epochs, steps at {decays}"
        rates = f"{recipe.optim.name} | {recipe.optim.lr:g} | {recipe.optim.weight_decay:g} | `{begin}`"
        results = f"{box[1] if box else ''} | {mask[1] if mask else ''} | {trained('coco', path)} | not run"
        lines.append(f"| `coco/{path.stem}` | {recipe.task.detect.detector} | {schedule} | {rates} | {results} |")
    return "\n".join(lines)


def segmenters() -> str:
    """One line a recipe for ADE20K."""
    columns = "recipe, paper, decoder, crop, length, batch, peak lr, begins with, settings, published mIoU"
    lines = heading(f"{columns}, trained model, ours")
    for path in sorted((PACKAGED / "ade20k").glob("*.yaml")):
        recipe, head = load_recipe(path), path.read_text()
        if recipe.task.kind != "segment":
            continue
        paper, miou = re.search(r"arXiv (\d{4}\.\d{5})", head), re.search(r"mIoU ([\d.]+) % \(published", head)
        decoder = re.search(r"with (.*), ADE20K", head)
        if not (paper and decoder and (miou or "not published with this head" in head)):
            raise SystemExit(f"{path} does not open with its paper, its decoder and its published mIoU")
        begin = recipe.model.name if recipe.model.pretrained else recipe.model.init_from
        length = f"{recipe.sched.steps} steps" if recipe.sched.steps else f"{recipe.sched.epochs:g} epochs"
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})"
        counts = f"{decoder[1]} | {recipe.data.size} | {length} | {recipe.data.batch} | {recipe.optim.lr:g}"
        rest = f"`{begin}` | {settings(head)} | {miou[1] if miou else ''} | {trained('ade20k', path)} | not run"
        lines.append(f"| `ade20k/{path.stem}` | {link} | {counts} | {rest} |")
    return "\n".join(lines)


def panoptic() -> str:
    """One line a panoptic recipe."""
    lines = heading("recipe, paper of the backbone, head, crop, steps, batch, peak lr, begins with, settings, ours")
    for path in sorted(PACKAGED.glob("*/panoptic_*.yaml")):
        recipe, head = load_recipe(path), path.read_text()
        if not (paper := re.search(r"arXiv (\d{4}\.\d{5})", head)):
            raise SystemExit(f"{path} does not open with the paper of its backbone")
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})"
        counts = f"{recipe.task.detect.detector} | {recipe.data.aug.crop} | {recipe.sched.steps}"
        rates = f"{recipe.data.batch} | {recipe.optim.lr:g} | `{recipe.model.name}` | {settings(head)} | not run"
        lines.append(f"| `{path.parent.name}/{path.stem}` | {link} | {counts} | {rates} |")
    return "\n".join(lines)


TABLES = {
    "keys": keys,
    "registered": registered,
    "sizes": sizes,
    "recipes": recipes,
    "segmenters": segmenters,
    "coco": coco,
    "panoptic": panoptic,
}


if __name__ == "__main__":
    sys.exit(main(__doc__, [PAGE], TABLES))
