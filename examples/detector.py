"""A backbone of tessel below one of torchvision's detectors.

Puts `DenseBackbone` and a feature pyramid below torchvision's FCOS, trains it for 30 steps to find bright rectangles on
noise, and prints the loss as it falls and the best box of one image beside the true one.

    python examples/detector.py

`tessel train` does the same with COCO or Pascal VOC, augmentation, resuming and evaluation.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

from tessel.zoo.dense import DenseBackbone

SIDE, STEPS = 96, 30


class Pyramid(nn.Module):
    """Image [B, 3, H, W] to a dict of four maps [B, out_channels, H / stride, W / stride] for torchvision."""

    def __init__(self, name: str, channels: int):
        super().__init__()
        self.backbone, self.out_channels = DenseBackbone(name), channels
        self.pyramid = FeaturePyramidNetwork(self.backbone.channels, channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.pyramid(OrderedDict((str(level), features) for level, features in enumerate(self.backbone(x))))


def scene() -> tuple[Tensor, dict[str, Tensor]]:
    """An image [3, H, W] in 0..1 with one bright rectangle, and its box (x1, y1, x2, y2)."""
    image = 0.3 * torch.rand(3, SIDE, SIDE)
    (x, y), (width, height) = torch.randint(0, SIDE // 2, (2,)).tolist(), torch.randint(20, SIDE // 2, (2,)).tolist()
    image[:, y : y + height, x : x + width] += 0.6
    return image, {"boxes": torch.tensor([[x, y, x + width, y + height]]).float(), "labels": torch.tensor([1])}


torch.manual_seed(0)
anchors = AnchorGenerator(sizes=((8,), (16,), (32,), (64,)), aspect_ratios=((1.0,),) * 4)  # one for each map
model = FCOS(Pyramid("cswin_atto", 64), 2, anchor_generator=anchors, min_size=SIDE, max_size=SIDE)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(STEPS):
    images, targets = zip(*(scene() for _ in range(4)), strict=True)
    loss = sum(model(list(images), list(targets)).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:2}: loss {loss:.2f}")

image, target = scene()
with torch.inference_mode():
    found = model.eval()([image])[0]
overlap = box_iou(found["boxes"][:1], target["boxes"])[0, 0]
print(
    "true box",
    target["boxes"][0].int().tolist(),
    "- best found",
    found["boxes"][0].int().tolist(),
    f"- IoU {overlap:.2f}",
)
