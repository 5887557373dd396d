"""Time, multiply-adds and peak memory of backbones in UPerNet and Mask R-CNN, at the usual image sizes.

    python benchmarks/dense.py                                     one model of each family beside Swin-T and ConvNeXt-T
    python benchmarks/dense.py --models cswin_tiny --tasks upernet --passes inference
    python benchmarks/dense.py --device cuda --batch 2             bfloat16
    python benchmarks/dense.py --dry-run                           tiny models and images, in seconds

UPerNet: mmsegmentation's head of 512 channels and its auxiliary head, 150 classes, 512 x 512 pixels, at least two
images in training. Mask R-CNN: torchvision's, on a feature pyramid, 800 x 1333 pixels, padded to 800 x 1344, with
parameters by which it finds 100 objects. The models are timed in turns within one process. Multiply-adds are those of
one image, 1000 proposals and 100 objects. Memory is the peak of a whole process on the CPU (weights and libraries
included), and of the tensors on a GPU. Results: benchmarks/results/dense_DEVICE.{json,md}, or the path of --out.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from measurement import DEVICES, allocated, check, facts, in_own_process, precision, ratio, side_by_side
from models import default_models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tessel import zoo
from tessel.train.recipe.schema import Dense, Model
from tessel.train.system import peak_resident
from tessel.train.tasks.detect.detectors import build_detector
from tessel.train.tasks.detect.options import DetectOptions
from tessel.train.tasks.segment.model import Segmenter, build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

STATUS = Path("/proc/self/status")  # of Linux
RESULTS = Path(__file__).resolve().parent / "results"
PASSES = ("inference", "training")
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")
COLUMNS = (
    "task", "model", "parameters", "gmacs", "height", "width", "batch", "pass", "images_per_second", "ratio",
    "peak_mib",
)  # fmt: skip


class Case(NamedTuple):
    """A task at one image size. min_batch: for training; UPerNet has a batch norm on maps of one pixel."""

    task: str
    height: int
    width: int
    build: Callable[[str, int, int], Any]
    classes: int
    min_batch: int = 1


def options(name: str, height: int, width: int) -> tuple[dict[str, Any], tuple[bool, ...] | None]:
    """(kwargs, dense.norms) of a backbone: the norms of the paper, or for a model of timm one on each output."""
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    norms = None if name in zoo.list_models() else (True,) * 4
    return ({"img_size": (height, -(-width // 32) * 32)} if fixed else {}), norms


def upernet(name: str, height: int, width: int, *, channels: int = 512) -> Segmenter:
    arguments, norms = options(name, height, width)
    auxiliary = {"type": "FCNHead", "channels": channels // 2, "num_convs": 1, "concat_input": False}
    auxiliary |= {"loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4}}
    heads = SegmentOptions(decode_head={"type": "UPerHead", "channels": channels}, auxiliary_head=auxiliary)
    classes = [str(number) for number in range(CASES["upernet"].classes)]
    return build_segmenter(Model(name=name, kwargs=arguments), heads, dense=Dense(norms=norms), classes=classes)


def mask_rcnn(name: str, height: int, width: int, **kwargs: int) -> Any:
    arguments, norms = options(name, height, width)
    model, dense, classes = Model(name=name, kwargs=arguments), Dense(norms=norms), CASES["mask_rcnn"].classes
    detect = DetectOptions(detector="mask_rcnn", max_size=width, kwargs=kwargs)
    detector: Any = build_detector(model, detect, dense=dense, size=height, classes=classes)
    # a high bias makes every proposal an object of the first class, so that the mask head gets as many as possible
    nn.init.constant_(detector.roi_heads.box_predictor.cls_score.bias[1:2], 10)
    return detector


SMALL_BATCHES = {"rpn_post_nms_top_n_train": 32, "rpn_post_nms_top_n_test": 32, "box_batch_size_per_image": 8}
CASES = {
    "upernet": Case("upernet", 512, 512, upernet, 150, 2),
    "mask_rcnn": Case("mask_rcnn", 800, 1333, mask_rcnn, 90),
}
DRY_CASES = {
    "upernet": Case("upernet", 64, 64, partial(upernet, channels=16), 150, 2),
    "mask_rcnn": Case("mask_rcnn", 64, 96, partial(mask_rcnn, box_detections_per_img=4, **SMALL_BATCHES), 90),
}


def masks(case: Case, batch: int, device: str) -> Tensor:
    """Random semantic masks [B, H, W]."""
    return torch.randint(case.classes, (batch, case.height, case.width), device=device)


def objects(case: Case, batch: int, device: str) -> list[dict[str, Tensor]]:
    """Targets with eight random boxes per image, and the filled boxes as masks."""
    sides = torch.tensor([case.width, case.height])
    found = []
    for _ in range(batch):
        corners = torch.rand(8, 2) * sides / 2
        boxes = torch.cat([corners, corners + sides / 4], -1).round()
        filled = torch.zeros(8, case.height, case.width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(filled, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        target = {"boxes": boxes, "labels": torch.randint(case.classes, (8,)), "masks": filled}
        found.append({key: tensor.to(device) for key, tensor in target.items()})
    return found


@cache
def cost(case: Case, name: str) -> tuple[float, float]:
    """Parameters in millions and multiply-adds of one image in billions."""
    # built on the CPU and moved, because the segmenter's checks of its heads need real tensors
    model = case.build(name, case.height, case.width).eval().to("meta")
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(1, 3, case.height, -(-case.width // 32) * 32)
        with FlopCounterMode(display=False) as counter:
            if case.task == "upernet":
                model(images)
            else:
                heads = model.roi_heads
                model.rpn.head(list(model.backbone(images).values()))
                heads.box_predictor(heads.box_head(torch.empty(1000, 256, 7, 7)))
                heads.mask_predictor(heads.mask_head(torch.empty(100, 256, 14, 14)))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def prepare(case: Case, name: str, *, train: bool, batch: int, device: str) -> Callable[[], None]:
    """The function to be timed: an inference, or a forward and backward pass."""
    torch.manual_seed(0)
    layout, segments = torch.channels_last, case.task == "upernet"
    model = case.build(name, case.height, case.width).to(device, memory_format=layout).train(train)
    images: Any = torch.rand(batch, 3, case.height, case.width, device=device).contiguous(memory_format=layout)
    targets: Any = (masks if segments else objects)(case, batch, device)
    images = images if segments else list(images)

    def run() -> None:
        with precision(device):
            if not train:
                with torch.inference_mode():
                    found = model(images)
                    if segments:
                        found.argmax(1)
                return
            losses = model(images, targets)
        # mmsegmentation's heads return their accuracy too
        sum(loss for key, loss in losses.items() if "acc" not in key).backward()
        model.zero_grad(set_to_none=True)

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
    run = prepare(case, name, train=train, batch=batch, device=device)
    run()
    return allocated(run)[1] / 2**20


def compare(case: Case, names: list[str], peers: list[str], *, train: bool, args: argparse.Namespace) -> list[dict]:
    """A row for each model, timed in turns; `ratio` is the speed of the model over that of the first peer."""
    batch = max(args.batch, case.min_batch) if train else args.batch
    kind = {"train": train, "batch": batch, "device": args.device}
    everyone, title = [*names, *peers], f"{case.task}, {PASSES[train]}"
    # first, while this process is small: all models together may need the whole memory of the machine
    peaks = {n: peak_mib(case, n, dry=args.dry_run, **kind) for n in tqdm(everyone, f"memory, {title}", disable=None)}
    runs = {name: prepare(case, name, **kind) for name in everyone}
    times = side_by_side(runs, seconds=args.seconds, device=args.device, least=args.rounds)
    rows = []
    for name in everyone:
        parameters, gmacs = cost(case, name)
        values = (
            case.task, name, round(parameters, 2), round(gmacs, 3), case.height, case.width, batch,
            PASSES[train], round(batch / statistics.median(times[name]), 4),
            round(ratio(times, name, peers[0]), 3), round(peaks[name], 1),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def table(rows: list[dict], peer: str) -> str:
    head = ("task", "model", "M parameters", "GMACs", "size", "batch", "pass", "images/s", f"speed of {peer} = 1")
    lines = ["| " + " | ".join((*head, "peak MiB")) + " |", "|" + "---|" * (len(head) + 1)]
    for row in rows:
        values = {**row, "height": f"{row['height']}x{row['width']}", "ratio": f"{row['ratio']:.2f}"}
        lines.append("| " + " | ".join(str(values[c]) for c in COLUMNS if c != "width") + " |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: one of each family")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="models to compare with (default: Swin-T, ConvNeXt-T)"
    )
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each model and pass (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="minimum number of rounds after the warm-up (default 3)")
    parser.add_argument("--dry-run", action="store_true", help="one tiny model and one tiny peer on tiny images")
    parser.add_argument("--add", action="store_true", help="keep the rows of other tasks and passes in the file")
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.models = args.models or (["biformer_atto"] if args.dry_run else default_models())
    args.peers = args.peers or (["convnext_atto"] if args.dry_run else list(PEERS))
    check(parser, args)
    return args


def main() -> None:
    args = parse()
    cases = [(DRY_CASES if args.dry_run else CASES)[task] for task in args.tasks]
    if args.one:
        prepare(cases[0], args.one, train=args.passes == ["training"], batch=args.batch, device="cpu")()
        print(peak_memory())
        return
    where = facts(args.device)
    out = args.out or RESULTS / ("dense_dry_run" if args.dry_run else f"dense_{args.device}")
    measured = {(case.task, direction) for case in cases for direction in args.passes}
    rows = json.loads(out.with_suffix(".json").read_text())["rows"] if args.add else []
    rows = [row for row in rows if (row["task"], row["pass"]) not in measured]
    heading = f"{where['device']}, {where['threads']} threads, torch {where['torch']}\n\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for direction in args.passes:
            rows += compare(case, args.models, args.peers, train=direction == "training", args=args)
            # written after each case, since a later one may run out of memory
            out.with_suffix(".json").write_text(
                json.dumps({**where, "dry_run": args.dry_run, "rows": rows}, indent=1) + "\n"
            )
            out.with_suffix(".md").write_text(heading + table(rows, args.peers[0]))
    print(table(rows, args.peers[0]))
    print(f"written: {out}.json, .md", file=sys.stderr)


if __name__ == "__main__":
    main()
