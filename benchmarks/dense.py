"""Time, multiply-adds and peak memory of backbones below heads for dense tasks, at the usual image sizes.

    python benchmarks/dense.py                                     one model of each family beside Swin-T and ConvNeXt-T
    python benchmarks/dense.py --heads                             heads below one model, Swin-T and ConvNeXt-T
    python benchmarks/dense.py --heads --count                     their parameters and multiply-adds only
    python benchmarks/dense.py --models cswin_tiny --tasks upernet --passes inference
    python benchmarks/dense.py --device cuda --batch 2             bfloat16
    python benchmarks/dense.py --dry-run                           tiny models and images, in seconds

UPerNet: mmsegmentation's head of 512 channels and its auxiliary head, 150 classes, 512 x 512 pixels, at least two
images in training. Mask R-CNN: torchvision's, on a feature pyramid, 800 x 1333 pixels, padded to 800 x 1344, with
parameters by which it finds 100 objects. `--heads`: segmenters at 512 x 512 pixels and 150 classes, detectors at 640 x
640 pixels and 90 classes, with their default settings, two images in training. An image has 8 objects to be detected,
and 16 regions to be segmented by mask classification.

The models are timed in turns within one process, by the clock on the wall, or with `--clock cpu` by the CPU time of the
process, which other work on the machine disturbs less. Multiply-adds are those of one image (Mask R-CNN: of 1000
proposals and 100 objects); reading maps at fractional places is not counted. Memory is the peak of a whole process on
the CPU (weights and libraries included), and of the tensors on a GPU. The share of the loss is what matching of queries
with objects, losses and the gradients of the losses take of a training step. Results:
benchmarks/results/dense_DEVICE.{json,md} or heads_DEVICE.{json,md}, or the path of --out.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dense_cases import CASES, DRY_CASES, HEADS, Case, criterion, masks, objects
from measurement import CLOCKS, DEVICES, allocated, check, facts, in_own_process, precision, ratio, side_by_side
from models import default_models
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tessel.train.system import peak_resident

STATUS = Path("/proc/self/status")  # of Linux
RESULTS = Path(__file__).resolve().parent / "results"
PASSES = ("inference", "training")
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")
COLUMNS = (
    "task", "model", "parameters", "gmacs", "height", "width", "batch", "pass", "images_per_second", "ratio",
    "peak_mib", "loss_share", "device",
)  # fmt: skip


def convolved(x: Any, weight: Any, *rest: Any, out_shape: Any, **more: Any) -> int:
    """Operations of a deformable convolution, which torch does not count."""
    return 2 * out_shape[0] * out_shape[2] * out_shape[3] * weight[0] * weight[1] * weight[2] * weight[3]


@cache
def cost(case: Case, name: str) -> tuple[float, float]:
    """Parameters in millions and multiply-adds of one image in billions."""
    device = "meta" if case.meta else "cpu"
    # built on the CPU and moved, because the segmenter's checks of its heads need real tensors
    model = case.build(name, case.height, case.width).eval().requires_grad_(False).to(device)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: convolved})
    # torch does not count its fused attention of the CPU
    with torch.device(device), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        images = torch.zeros(1, 3, case.height, -(-case.width // 32) * 32)
        if case.task == "mask_rcnn":
            heads = model.roi_heads
            model.rpn.head(list(model.backbone(images).values()))
            heads.box_predictor(heads.box_head(torch.empty(1000, 256, 7, 7)))
            heads.mask_predictor(heads.mask_head(torch.empty(100, 256, 14, 14)))
        else:
            model(images if case.segments else list(images))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


class Prepared(NamedTuple):
    """A model, and the function to be timed: an inference, or a forward and backward pass."""

    model: Any
    run: Callable[[], None]


def prepare(case: Case, name: str, *, train: bool, batch: int, device: str) -> Prepared:
    torch.manual_seed(0)
    layout = torch.channels_last
    model = case.build(name, case.height, case.width).to(device, memory_format=layout).train(train)
    images: Any = torch.rand(batch, 3, case.height, case.width, device=device).contiguous(memory_format=layout)
    targets: Any = (masks if case.segments else objects)(case, batch, device)
    images = images if case.segments else list(images)

    def run() -> None:
        with precision(device):
            if not train:
                with torch.inference_mode():
                    found = model(images)
                    if case.segments:
                        found.argmax(1)
                return
            losses = model(images, targets)
        # mmsegmentation's heads return their accuracy too
        sum(loss for key, loss in losses.items() if "acc" not in key).backward()
        model.zero_grad(set_to_none=True)

    return Prepared(model, run)


def loss_alone(prepared: Prepared) -> Callable[[], None] | None:
    """A function that repeats the matching, the losses and their gradients of one training step, if there is matching.

    It ends at the outputs of the head.
    """
    place = criterion(prepared.model)
    if place is None:
        return None
    owner, name = place
    original, calls = getattr(owner, name), []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, remembered)
    prepared.run()
    setattr(owner, name, original)

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_(x.requires_grad)

    ((args, kwargs),) = tree_map_only(Tensor, leaf, calls)

    def run() -> None:
        found = original(*args, **kwargs)
        losses = list(found.values()) if isinstance(found, dict) else [found[0]]
        sum(losses).backward()
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                x.grad = None

    return run


def peak_memory() -> float:
    """Peak memory of this process in MiB. Linux' `getrusage` would include that of its parent before exec."""
    if not STATUS.exists():
        return (peak_resident() or 0) / 2**20
    status = STATUS.read_text("utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def peak_mib(case: Case, name: str, *, train: bool, batch: int, device: str, dry: bool) -> float:
    if device == "cpu":
        what = ("--one", name, "--tasks", case.task, "--passes", PASSES[train], "--batch", str(batch))
        return float(in_own_process(__file__, *what, *(["--dry-run"] if dry else [])))
    run = prepare(case, name, train=train, batch=batch, device=device).run
    run()
    return allocated(run)[1] / 2**20


def compare(case: Case, names: list[str], peers: list[str], *, train: bool, args: argparse.Namespace) -> list[dict]:
    """A row for each model, timed in turns; `ratio` is the speed of the model over that of the first peer."""
    batch = max(args.batch, case.min_batch) if train else args.batch
    kind = {"train": train, "batch": batch, "device": args.device}
    everyone, title = list(dict.fromkeys([*names, *peers])), f"{case.task}, {PASSES[train]}"
    # first, while this process is small: all models together may need the whole memory of the machine
    peaks = {n: peak_mib(case, n, dry=args.dry_run, **kind) for n in tqdm(everyone, f"memory, {title}", disable=None)}
    prepared = {name: prepare(case, name, **kind) for name in everyone}
    timing: dict[str, Any] = {"device": args.device, "least": args.rounds, "clock": CLOCKS[args.clock]}
    times = side_by_side({name: one.run for name, one in prepared.items()}, seconds=args.seconds, **timing)
    losses = {name: alone for name, one in prepared.items() if train and (alone := loss_alone(one))}
    loss_times = side_by_side(losses, seconds=args.seconds, **timing) if losses else {}
    rows = counted(case, everyone)
    for name, row in zip(everyone, rows, strict=True):
        median = statistics.median(times[name])
        share = round(statistics.median(loss_times[name]) / median, 4) if losses else None
        row |= {"batch": batch, "pass": PASSES[train], "images_per_second": round(batch / median, 4)}
        row |= {"ratio": round(ratio(times, name, peers[0]), 3), "peak_mib": round(peaks[name], 1), "loss_share": share}
    return rows


def counted(case: Case, names: list[str]) -> list[dict]:
    """A row for each model with its parameters and multiply-adds, and without what has to be timed."""
    rows = []
    for name in tqdm(names, f"count, {case.task}", disable=None):
        parameters, gmacs = cost(case, name)
        row = {"task": case.task, "model": name, "parameters": round(parameters, 2), "gmacs": round(gmacs, 3)}
        rows.append(dict.fromkeys(COLUMNS) | row | {"height": case.height, "width": case.width, "pass": "count"})
    return rows


FORMS: dict[str, Callable[[float], str]] = {"loss_share": "{:.1%}".format, "ratio": "{:.2f}".format}


def table(rows: list[dict], peer: str) -> str:
    head = ("task", "model", "M parameters", "GMACs", "size", "batch", "pass", "images/s", f"speed of {peer} = 1")
    lines = [
        "| " + " | ".join((*head, "peak MiB", "share of the loss", "device")) + " |",
        "|" + "---|" * (len(head) + 3),
    ]
    for row in rows:
        values = {key: "" if value is None else value for key, value in row.items()}
        values["height"] = f"{row['height']}x{row['width']}"
        values |= {key: form(row[key]) for key, form in FORMS.items() if row[key] is not None}
        lines.append("| " + " | ".join(str(values[c]) for c in COLUMNS if c != "width") + " |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: one of each family")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="models to compare with (default: Swin-T, ConvNeXt-T)"
    )
    parser.add_argument("--heads", action="store_true", help="compare heads, below one model and the peers")
    parser.add_argument(
        "--tasks", nargs="+", choices=CASES, help="default: upernet, mask_rcnn; with --heads all others"
    )
    parser.add_argument("--batch", type=int, help="default 1, with --heads 2")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--count", action="store_true", help="parameters and multiply-adds only")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each model and pass (default 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is measured (default wall)")
    parser.add_argument("--rounds", type=int, default=3, help="minimum number of rounds after the warm-up (default 3)")
    parser.add_argument("--dry-run", action="store_true", help="one tiny model and one tiny peer on tiny images")
    parser.add_argument("--add", action="store_true", help="keep the rows of other tasks and passes in the file")
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or (2 if args.heads else 1)
    args.passes = ["count"] if args.count else args.passes
    args.tasks = args.tasks or (list(HEADS) if args.heads else ["upernet", "mask_rcnn"])
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu measures the time of the CPU; leave it out for another device")
    default = ["cswin_tiny"] if args.heads else default_models
    args.models = args.models or (["biformer_atto"] if args.dry_run else default() if callable(default) else default)
    args.peers = args.peers or (["convnext_atto"] if args.dry_run else list(PEERS))
    check(parser, args)
    return args


def main() -> None:
    args = parse()
    cases = [(DRY_CASES if args.dry_run else CASES)[task] for task in args.tasks]
    if args.one:
        prepare(cases[0], args.one, train=args.passes == ["training"], batch=args.batch, device="cpu").run()
        print(peak_memory())
        return
    where = facts(args.device)
    kind = "heads" if args.heads else "dense"
    out = args.out or RESULTS / (f"{kind}_dry_run" if args.dry_run else f"{kind}_{args.device}")
    measured = {(case.task, direction) for case in cases for direction in args.passes}
    rows = json.loads(out.with_suffix(".json").read_text())["rows"] if args.add else []
    rows = [dict.fromkeys(COLUMNS) | row for row in rows]
    rows = [row for row in rows if (row["task"], row["pass"]) not in measured]
    where |= {"clock": args.clock}
    heading = f"torch {where['torch']}, clock: {args.clock}\n\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for direction in args.passes:
            if args.count:
                new = counted(case, list(dict.fromkeys([*args.models, *args.peers])))
            else:
                new = compare(case, args.models, args.peers, train=direction == "training", args=args)
            # --add keeps rows that were measured elsewhere
            rows += [row | {"device": f"{where['device']}, {where['threads']} threads"} for row in new]
            # written after each case, since a later one may run out of memory
            out.with_suffix(".json").write_text(
                json.dumps({**where, "dry_run": args.dry_run, "rows": rows}, indent=1) + "\n"
            )
            out.with_suffix(".md").write_text(heading + table(rows, args.peers[0]))
    print(table(rows, args.peers[0]))
    print(f"written: {out}.json, .md", file=sys.stderr)


if __name__ == "__main__":
    main()
