"""HiLo beside spatial-reduction attention and 7 x 7 windows at the shape of LITv2-S's third stage, on the CPU.

    python benchmarks/hilo.py [--batch 1,8,32] [--threads 1]

The three take turns within one process: a map of 14 x 14 tokens of 384 channels, 12 heads. The others are timm's own
modules, as PVTv2 (reduction 2 at this stage) and Swin use them, and our window attention. Pan et al. (arXiv 2205.13213)
publish 1.4 and 1.6 times. Results: benchmarks/results/hilo_cpu.json.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from measurement import facts, ratio, side_by_side
from timm.models.pvt_v2 import Attention
from timm.models.swin_transformer import SwinTransformerBlock

from tessel.blocks import HiLo, Window

RESULTS = Path(__file__).resolve().parent / "results"
DIM, HEADS, SIDE = 384, 12, 14


def contenders(batch: int) -> dict:
    """Name -> a forward pass without gradients."""
    hilo = HiLo(DIM, num_heads=HEADS, window=2, alpha=0.9).eval()
    window = Window(DIM, num_heads=HEADS, window=7).eval()
    reduction = Attention(DIM, num_heads=HEADS, sr_ratio=2, linear_attn=False).eval()
    swin = SwinTransformerBlock(DIM, input_resolution=(SIDE, SIDE), num_heads=HEADS, window_size=7).eval()
    tokens = torch.randn(batch, SIDE, SIDE, DIM)
    return {
        "HiLo": lambda: hilo(tokens.permute(0, 3, 1, 2)),
        "spatial reduction (timm)": lambda: reduction(tokens.flatten(1, 2), [SIDE, SIDE]),
        "7x7 windows (timm)": lambda: swin._attn(tokens),
        "7x7 windows (ours)": lambda: window(tokens.permute(0, 3, 1, 2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,8,32", help="batch sizes, with commas (default 1,8,32)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each contender and batch (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "hilo_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{'batch':>6}  {'':26}{'ms':>8}   HiLo is faster by")
    for batch in map(int, args.batch.split(",")):
        runs = contenders(batch)
        with torch.inference_mode():
            times = side_by_side(runs, seconds=args.seconds)
        for name in runs:
            row = {"batch": batch, "mixer": name, "ms": round(1e3 * statistics.median(times[name]), 3)}
            row["hilo_faster_by"] = round(ratio(times, "HiLo", name), 3)
            rows.append(row)
            print(f"{batch:6}  {name:26}{row['ms']:8.2f}   {row['hilo_faster_by']:.2f}x")
    args.out.write_text(
        json.dumps({**facts(), "dim": DIM, "heads": HEADS, "side": SIDE, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
