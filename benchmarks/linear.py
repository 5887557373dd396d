"""Time of linear layers in single precision on the CPU: by oneDNN, and as PyTorch computes them.

    python benchmarks/linear.py                 layers of DaViT-T at 224 pixels, one image and eight
    python benchmarks/linear.py --batch 4

Inference is the product, training the product and the gradients of input, weight and bias. Both ways are timed in turns
within one process, by the CPU time of the process, with the threads that PyTorch takes (set OMP_NUM_THREADS). Models
take oneDNN where kernels/linear.py expects it to be faster. Results: benchmarks/results/linear_cpu.{json,md}.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measurement import facts, ratio, side_by_side
from tqdm import tqdm

from tessel.kernels.linear import onednn_is_faster, onednn_linear

RESULTS = Path(__file__).resolve().parent / "results"

# side of the map, inputs, outputs: layers of the four stages of DaViT-T
LAYERS = [
    (56, 96, 288),
    (56, 96, 384),
    (28, 192, 576),
    (28, 192, 768),
    (14, 384, 1152),
    (14, 384, 1536),
    (14, 1536, 384),
    (7, 768, 2304),
    (7, 3072, 768),
]


def passes(batch: int, side: int, inputs: int, outputs: int) -> dict[str, dict[str, Callable]]:
    """Inference and training of one layer, each by oneDNN and by PyTorch's choice."""
    x, weight, bias, dy = (
        torch.randn(*shape)
        for shape in ((batch, side, side, inputs), (outputs, inputs), (outputs,), (batch, side, side, outputs))
    )
    trained = [t.clone().requires_grad_() for t in (x, weight, bias)]

    def training(linear: Callable) -> Callable:
        return lambda: torch.autograd.grad(linear(*trained), trained, dy)

    ways = {"oneDNN": onednn_linear, "PyTorch": F.linear}
    return {
        "inference": {name: lambda linear=linear: linear(x, weight, bias) for name, linear in ways.items()},
        "training": {name: training(linear) for name, linear in ways.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images (default 1 8)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each way (default 0.3)")
    parser.add_argument("--out", type=Path, default=RESULTS / "linear_cpu", help="results, without suffix")
    args = parser.parse_args()
    rows = []
    for batch, (side, inputs, outputs) in tqdm([(b, layer) for b in args.batch for layer in LAYERS], disable=None):
        for name, runs in passes(batch, side, inputs, outputs).items():
            times = side_by_side(runs, seconds=args.seconds, clock=time.process_time)
            products = batch * side**2 * inputs * outputs * (3 if name == "training" else 1)
            rate = {way: round(2e-9 * products / statistics.median(t), 1) for way, t in times.items()}
            row = {"pass": name, "batch": batch, "side": side, "inputs": inputs, "outputs": outputs}
            rows.append(row | {"gflops": rate, "ratio": round(ratio(times, "oneDNN", "PyTorch"), 2)})
    found = facts() | {"expected_faster": onednn_is_faster, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        f"{found['device']}, {found['threads']} threads, torch {found['torch']}",
        "",
        "| pass | map | inputs | outputs | oneDNN, GFLOP/s | PyTorch, GFLOP/s | oneDNN's speed, PyTorch's = 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["pass"], f"{row['batch']}x{row['side']}x{row['side']}", row["inputs"], row["outputs"]]
        cells += [row["gflops"]["oneDNN"], row["gflops"]["PyTorch"], row["ratio"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
