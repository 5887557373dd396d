"""Peak memory of bi-level routing at 512 x 512: tessel and a plain expand-and-gather, in one run.

    python benchmarks/routing_memory.py [--size 512] [--batch 1]

Forward and backward of the three routed stages of `biformer_base` run in processes of their own, with the 8 x 8 regions
that the paper uses at this size. The figure is the peak of the resident set above its level before the forward. The
published code gathers from keys and values that are expanded to every query region, so its backward holds n_regions
copies of them. `tessel.kernels.routed` recomputes gathered keys and values group by group.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from measurement import facts, in_own_process, peak_of
from torch import Tensor

from tessel.blocks import BiLevelRouting

STAGES = {  # stride, dim, num_heads, topk of biformer_base
    "stage 1": (4, 96, 3, 1),
    "stage 2": (8, 192, 6, 4),
    "stage 3": (16, 384, 12, 16),
}
REGIONS_PER_SIDE = 8


def expand_and_gather(qkv: Tensor, index: Tensor, *, grid: tuple[int, int], scale: float) -> Tensor:
    """Routed attention as the paper writes it: expand keys and values, gather, attend."""
    from tessel.kernels.routed.regions import merge_regions, split_regions

    q, k, v = (split_regions(x, grid) for x in qkv.unbind(3))  # [B, R, heads, r, head_dim]
    batch, regions, heads, pixels, width = q.shape

    def gathered(t: Tensor) -> Tensor:
        expanded = t[:, None].expand(-1, regions, -1, -1, -1, -1)
        where = index[..., None, None, None].expand(-1, -1, -1, heads, pixels, width)
        return expanded.gather(2, where).transpose(2, 3).flatten(3, 4)

    weights = ((q * scale) @ gathered(k).mT).softmax(-1)
    return merge_regions(weights @ gathered(v), grid, (qkv.shape[1], qkv.shape[2]))


def measure(form: str, stage: str, size: int, batch: int) -> None:
    """Print the peak in MiB of one implementation in one stage."""
    stride, dim, heads, topk = STAGES[stage]
    if form == "expand and gather":
        sys.modules["tessel.blocks.bi_level_routing"].__dict__["routed_attention"] = expand_and_gather
    torch.manual_seed(0)
    mixer = BiLevelRouting(dim, num_heads=heads, n_win=REGIONS_PER_SIDE, topk=topk)
    x = torch.randn(batch, dim, size // stride, size // stride, requires_grad=True)
    warm = torch.randn(1, dim, 16, 16, requires_grad=True)
    mixer(warm).sum().backward()
    print(peak_of(lambda: mixer(x).sum().backward()) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="image side in pixels (default 512)")
    parser.add_argument("--batch", type=int, default=1, help="images (default 1)")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--one", nargs=2, metavar=("FORM", "STAGE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(*options.one, options.size, options.batch)
        return
    rows = []
    print(f"{'':10}{'expand and gather':>20}{'tessel':>10}{'ratio':>8}   (MiB)")
    for stage in STAGES:
        peaks = []
        for form in ("expand and gather", "tessel"):
            size = ("--size", str(options.size), "--batch", str(options.batch))
            peaks.append(float(in_own_process(__file__, "--one", form, stage, *size)))
        rows.append({"stage": stage, "expand_and_gather_mib": peaks[0], "tessel_mib": peaks[1]})
        print(f"{stage:10}{peaks[0]:20.1f}{peaks[1]:10.1f}{peaks[1] / peaks[0]:8.2f}")
    if options.json:
        report = {**facts(), "size": options.size, "batch": options.batch, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
