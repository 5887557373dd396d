"""Feature maps of every stage of a backbone, on one photograph.

Prints the stride, the number of channels and the size of each of the four maps. Any model of
`tessel.zoo.list_models()` works, at any image size. `pretrained=True` loads published weights
where they can be fetched (`tessel weights list`).

    python examples/features.py [MODEL]
"""

import sys

import timm
import torch
from sklearn.datasets import load_sample_image
from timm.data import resolve_model_data_config

import tessel.zoo  # noqa: F401  registers the models with timm

name = sys.argv[1] if len(sys.argv) > 1 else "cswin_atto"
model = timm.create_model(name, features_only=True).eval()

# a photograph of 427 x 640 pixels that comes with scikit-learn: [H, W, 3] -> [1, 3, H, W]
photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
config = resolve_model_data_config(model)
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

with torch.inference_mode():
    maps = model((photograph - mean) / std)

print(f"{name} on an image of {photograph.shape[2]} x {photograph.shape[3]} pixels")
for stage, (features, stride) in enumerate(zip(maps, model.feature_info.reduction(), strict=True)):
    print(f"stage {stage}: stride {stride:2}, [B, C, H, W] = {list(features.shape)}")
