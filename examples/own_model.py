"""The token mixers as parts of a model of your own.

Builds one small classifier four times, each time with another mixer, trains each for 60 steps on handwritten digits,
and prints parameters, accuracy and time side by side. Every mixer maps [B, C, H, W] to [B, C, H, W], so that exchanging
one for another changes a single line.

    python examples/own_model.py
"""

import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.layers import LayerNorm2d
from torch import nn

from tessel.blocks import BiLevelRouting, FullAttention, HiLo, Mlp, Residual, Strip, block, conv_norm

DIM, HEADS, DEPTH, STEPS = 48, 3, 2, 60
MIXERS = {
    "full attention": lambda: FullAttention(DIM, num_heads=HEADS),
    "HiLo (LITv2)": lambda: HiLo(DIM, num_heads=HEADS, window=2),
    "bi-level routing (BiFormer)": lambda: BiLevelRouting(DIM, num_heads=HEADS, n_win=4, topk=2),
    "strip attention (S2AFormer)": lambda: Strip(DIM, num_heads=HEADS, reduction=2),
}


def build(mixer) -> nn.Module:
    blocks = [
        block(mixer=Residual(mixer(), norm=LayerNorm2d(DIM)), mlp=Residual(Mlp(DIM, ratio=2), norm=LayerNorm2d(DIM)))
        for _ in range(DEPTH)
    ]
    stem = conv_norm(1, DIM, kernel=3, stride=2)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(DIM, 10))


images, labels = load_digits(return_X_y=True)
images = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, size=16, mode="bilinear")
labels = torch.tensor(labels)

for name, mixer in MIXERS.items():
    torch.manual_seed(0)
    model, start = build(mixer), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        batch = torch.randint(1400, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        accuracy = (model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name:28} {parameters:7,} parameters, accuracy {accuracy:5.1%} after {STEPS} steps in {seconds:4.1f} s")
