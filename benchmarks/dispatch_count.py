"""Number of operations that PyTorch dispatches for one batch: on a GPU each is a launch, whatever its size.

    python benchmarks/dispatch_count.py                        the smallest published model of each family
    python benchmarks/dispatch_count.py --models cswin_tiny nat_mini --batch 16

Counts forward, and forward and backward, on the meta device, where nothing is computed, with plain definitions of the
operators. Left out are views, which launch nothing, and what only the first batch of a size computes. Goal: at most 4
times those of timm's swin_tiny. Results go to benchmarks/results/dispatch_count.{json,md}.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import tessel.zoo
from tessel.kernels import dispatch

RESULTS = Path(__file__).resolve().parent / "results"
PEER, GOAL = "swin_tiny_patch4_window7_224", 4.0


class Counter(TorchDispatchMode):
    """Counts the operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def smallest_models() -> list[str]:
    """Of each family the smallest model that was published."""

    def size(name: str) -> int:
        return sum(p.numel() for p in timm.create_model(name, device="meta").parameters())

    families = [[name for name in f.variants if not name.endswith("_atto")] for f in tessel.zoo.list_families()]
    return [min(names, key=size) for names in families if names]


def count(name: str, batch: int) -> tuple[int, int]:
    """Operations of a forward pass without gradients, and of a training step without its optimizer."""
    with torch.device("meta"):
        model = timm.create_model(name)
        size = model.pretrained_cfg["input_size"]
        images = torch.empty(batch, *size)
    with torch.no_grad():
        model.eval()(images)  # fills the caches of tensors that depend on the size of the map alone
    with Counter() as forward, torch.no_grad():
        model.eval()(images)
    with Counter() as both:
        model.train()(images).sum().backward()
    return forward.count, both.count


def table(rows: list[dict]) -> str:
    lines = ["| model | forward | to swin_tiny | forward+backward | to swin_tiny |", "|---|---|---|---|---|"]
    for row in rows:
        ratios = [f"{row[key] / rows[0][key]:.2f}" for key in ("forward", "both")]
        lines.append(f"| {row['model']} | {row['forward']} | {ratios[0]} | {row['both']} | {ratios[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: the smallest of each family")
    parser.add_argument("--batch", type=int, default=128, help="images (default 128)")
    parser.add_argument("--out", type=Path, default=RESULTS / "dispatch_count", help="results, without suffix")
    args = parser.parse_args()
    dispatch.use_backend("reference")
    rows = []
    for name in tqdm([PEER, *(args.models or smallest_models())], disable=None):
        forward, both = count(name, args.batch)
        rows.append({"model": name, "forward": forward, "both": both})
    found = {"torch": torch.__version__, "timm": timm.__version__, "batch": args.batch, "goal": GOAL, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
