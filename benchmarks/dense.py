"""Backbones at the sizes of dense prediction: time, multiply-adds and peak memory below UPerNet and Mask R-CNN.

    python benchmarks/dense.py                                     one model of each family beside Swin-T and ConvNeXt-T
    python benchmarks/dense.py --models cswin_tiny --tasks upernet --passes inference
    python benchmarks/dense.py --device cuda --batch 2             bfloat16
    python benchmarks/dense.py --dry-run                           tiny models and images, in seconds

UPerNet (mmsegmentation's head of 512 channels and its auxiliary head, 150 classes) takes images of 512 x 512, two of
them to train on; Mask R-CNN (torchvision's, on a feature pyramid) images of 800 x 1333, which it pads to 800 x 1344; as
it is set here it finds 100 objects. All models take turns within one process. Multiply-adds are of one image, 1000
proposals and 100 objects. Memory is the peak of a whole process on the CPU (weights and libraries too), of the tensors
on a GPU. Results: benchmarks/results/dense_DEVICE.{json,md}, or where --out says.
"""

import argparse
import json
import resource
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from measuring import facts, in_own_process, ratio, side_by_side
from models import DEFAULT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tqdm import tqdm

from tessel import zoo
from tessel.train import openmmlab
from tessel.zoo.dense import DenseBackbone

RESULTS = Path(__file__).resolve().parent / "results"
PASSES = ("inference", "training")
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")
COLUMNS = (
    "task", "model", "parameters", "gmacs", "height", "width", "batch", "pass", "images_per_second", "ratio",
    "peak_mib",
)  # fmt: skip


def backbone(name: str, height: int, width: int) -> DenseBackbone:
    """With the paper's own norms, and one on each map of timm's models."""
    options = {}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options = {"img_size": (height, -(-width // 32) * 32)}
    return DenseBackbone(name, norms=None if name in zoo.list_models() else [True] * 4, **options)


class UPerNet(nn.Module):
    classes = 150

    def __init__(self, name: str, height: int, width: int, *, channels: int = 512):
        super().__init__()
        self.backbone = backbone(name, height, width)
        common = {"num_classes": self.classes, "norm_cfg": {"type": "BN"}, "align_corners": False}
        widths = self.backbone.channels
        self.head = openmmlab.build(
            {"type": "UPerHead", "in_channels": widths, "in_index": [0, 1, 2, 3], "channels": channels, **common}
        )
        self.auxiliary = openmmlab.build(
            {"type": "FCNHead", "in_channels": widths[2], "in_index": 2, "channels": channels // 2, "num_convs": 1}
            | {"concat_input": False, **common}
        )

    def forward(self, images: Tensor) -> Tensor:
        return self._upsampled(self.head(self.backbone(images)), images).argmax(1)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        maps = self.backbone(images)
        main, auxiliary = (self._upsampled(head(maps), images) for head in (self.head, self.auxiliary))
        return F.cross_entropy(main.float(), labels) + 0.4 * F.cross_entropy(auxiliary.float(), labels)

    def _upsampled(self, logits: Tensor, images: Tensor) -> Tensor:
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")

    def targets(self, batch: int, height: int, width: int, device: str) -> Tensor:
        return torch.randint(self.classes, (batch, height, width), device=device)

    def cost(self, height: int, width: int) -> None:
        """What of the model counts towards its multiply-adds."""
        self(torch.empty(1, 3, height, width))


class Pyramid(nn.Module):
    def __init__(self, name: str, height: int, width: int):
        super().__init__()
        self.body, self.out_channels = backbone(name, height, width), 256
        self.fpn = FeaturePyramidNetwork(self.body.channels, self.out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(images))))


class Detector(nn.Module):
    def __init__(self, name: str, height: int, width: int, **options: int):
        super().__init__()
        anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
        self.net = MaskRCNN(
            Pyramid(name, height, width),
            num_classes=91,
            min_size=height,
            max_size=width,
            rpn_anchor_generator=anchors,
            **options,
        )
        # every proposal passes as an object of the first class: the mask head has as much to do as it can
        nn.init.constant_(self.net.roi_heads.box_predictor.cls_score.bias[1:2], 10)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        return self.net(list(images))

    def loss(self, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        return sum(self.net(list(images), targets).values())

    def targets(self, batch: int, height: int, width: int, device: str) -> list[dict[str, Tensor]]:
        """Eight boxes an image, filled."""
        corners = torch.rand(batch, 8, 2) * torch.tensor([width, height]) / 2
        boxes = torch.cat([corners, corners + torch.tensor([width, height]) / 4], -1).round()
        masks = torch.zeros(batch, 8, height, width, dtype=torch.uint8)
        for number, image in enumerate(boxes.int().tolist()):
            for index, (left, top, right, bottom) in enumerate(image):
                masks[number, index, top:bottom, left:right] = 1
        labels = torch.randint(1, 91, (batch, 8))
        return [
            {"boxes": b.to(device), "labels": c.to(device), "masks": m.to(device)}
            for b, c, m in zip(boxes, labels, masks, strict=True)
        ]

    def cost(self, height: int, width: int) -> None:
        maps = self.net.backbone(torch.empty(1, 3, height, -(-width // 32) * 32))
        self.net.rpn.head(list(maps.values()))
        heads = self.net.roi_heads
        heads.box_predictor(heads.box_head(torch.empty(1000, 256, 7, 7)))
        heads.mask_predictor(heads.mask_head(torch.empty(100, 256, 14, 14)))


class Case(NamedTuple):
    """A task at one size. `least`: the smallest batch to train with; UPerNet normalises one pixel an image."""

    task: str
    height: int
    width: int
    build: Callable[[str, int, int], nn.Module]
    least: int = 1


FEW = {"rpn_post_nms_top_n_train": 32, "rpn_post_nms_top_n_test": 32, "box_batch_size_per_image": 8}
CASES = {"upernet": Case("upernet", 512, 512, UPerNet, 2), "mask_rcnn": Case("mask_rcnn", 800, 1333, Detector)}
DRY = {
    "upernet": Case("upernet", 64, 64, partial(UPerNet, channels=16), 2),
    "mask_rcnn": Case("mask_rcnn", 64, 96, partial(Detector, box_detections_per_img=4, **FEW)),
}


@cache
def cost(case: Case, name: str) -> tuple[float, float]:
    """Parameters in millions and multiply-adds of one image in billions."""
    with torch.device("meta"), torch.no_grad():
        model = case.build(name, case.height, case.width).eval()
        with FlopCounterMode(display=False) as counter:
            model.cost(case.height, case.width)
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def prepare(case: Case, name: str, *, train: bool, batch: int, device: str) -> Callable[[], None]:
    """The call to be timed, of an inference or of a forward and backward."""
    torch.manual_seed(0)
    layout = torch.channels_last
    model = case.build(name, case.height, case.width).to(device, memory_format=layout).train(train)
    images = torch.rand(batch, 3, case.height, case.width, device=device).contiguous(memory_format=layout)
    targets = model.targets(batch, case.height, case.width, device)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if not train:
                with torch.inference_mode():
                    model(images)
                return
            loss = model.loss(images, targets)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def own_peak() -> float:
    """MiB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def peak_mib(case: Case, name: str, *, train: bool, batch: int, device: str, dry: bool) -> float:
    if device == "cpu":
        what = ("--one", name, "--tasks", case.task, "--passes", PASSES[train], "--batch", str(batch))
        return float(in_own_process(__file__, *what, *(["--dry-run"] if dry else [])))
    run = prepare(case, name, train=train, batch=batch, device=device)
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


def compare(case: Case, names: list[str], peers: list[str], *, train: bool, args: argparse.Namespace) -> list[dict]:
    """A row for each model, timed in turns; `ratio` is the speed of the first peer over the model's."""
    batch = max(args.batch, case.least) if train else args.batch
    kind = {"train": train, "batch": batch, "device": args.device}
    runs = {name: prepare(case, name, **kind) for name in [*names, *peers]}
    times = side_by_side(runs, seconds=args.seconds, device=args.device, least=args.rounds)
    runs.clear()
    rows = []
    for name in tqdm(times, f"memory, {case.task}", disable=None):
        parameters, gmacs = cost(case, name)
        values = (
            case.task, name, round(parameters, 2), round(gmacs, 3), case.height, case.width, batch,
            PASSES[train], round(batch / statistics.median(times[name]), 4),
            round(ratio(times, name, peers[0]), 3), round(peak_mib(case, name, dry=args.dry_run, **kind), 1),
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
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="models to meet (default: Swin-T, ConvNeXt-T)")
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each model and pass (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds at least, after one uncounted (default 3)")
    parser.add_argument("--dry-run", action="store_true", help="one tiny model and one tiny peer on tiny images")
    parser.add_argument("--add", action="store_true", help="keep what the file has of other tasks and passes")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.models = args.models or (["biformer_atto"] if args.dry_run else list(DEFAULT))
    args.peers = args.peers or (["convnext_atto"] if args.dry_run else list(PEERS))
    for name in [*args.models, *args.peers]:
        if not timm.is_model(name):
            parser.error(f"{name} is no registered model; see timm.list_models() and tessel.zoo.list_models()")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def main() -> None:
    args = parse()
    cases = [(DRY if args.dry_run else CASES)[task] for task in args.tasks]
    if args.one:
        prepare(cases[0], args.one, train=args.passes == ["training"], batch=args.batch, device="cpu")()
        print(own_peak())
        return
    where = facts(args.device)
    out = args.out or RESULTS / ("dense_dry_run" if args.dry_run else f"dense_{args.device}")
    measured = {(case.task, direction) for case in cases for direction in args.passes}
    rows = json.loads(out.with_suffix(".json").read_text())["rows"] if args.add else []
    rows = [row for row in rows if (row["task"], row["pass"]) not in measured]
    for case in cases:
        for direction in args.passes:
            rows += compare(case, args.models, args.peers, train=direction == "training", args=args)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({**where, "dry_run": args.dry_run, "rows": rows}, indent=1) + "\n")
    heading = f"{where['device']}, {where['threads']} threads, torch {where['torch']}\n\n"
    out.with_suffix(".md").write_text(heading + table(rows, args.peers[0]))
    print(table(rows, args.peers[0]))
    print(f"written: {out}.json, .md", file=sys.stderr)


if __name__ == "__main__":
    main()
