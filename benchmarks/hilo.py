"""Speed of HiLo, spatial-reduction attention and 7 x 7 windows at the shape of LITv2-S's third stage, on the CPU.

    python benchmarks/hilo.py [--batch 1,8,32] [--threads 1]

They run alternately in one process on a map of 14 x 14 tokens with 384 channels and 12 heads. Spatial reduction is
timm's PVTv2 attention (reduction 2 at this stage); window attention is timm's Swin and ours. Pan et al. (arXiv
2205.13213) report that HiLo is 1.4 times as fast as spatial reduction and 1.6 times as fast as windows. Results:
benchmarks/results/hilo_cpu.json.
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


def mixers(batch: int) -> dict:
    """Name -> function that runs a forward pass."""
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
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per mixer and batch size (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "hilo_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{'batch':>6}  {'':26}{'ms':>8}   HiLo is faster by")
    for batch in map(int, args.batch.split(",")):
        runs = mixers(batch)
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
