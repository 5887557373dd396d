"""The model card of a classifier that is pushed to the hub, in the form of timm's `generate_readme`."""

from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoints import load_manifest
from ..train.errors import UserError
from ..zoo._family import families

USAGE = """
```python
import tessel

model = tessel.load("hf-hub:{repository}")
print(model.predict("image.jpg")[0].summary())
```

`import tessel.zoo, timm` and `timm.create_model("hf-hub:{repository}", pretrained=True)` give the network.
"""


def model_card(source: str, predictor: Any, repository: str, license_: str | None) -> dict[str, Any]:
    """Description, license, details and usage of a classifier, by timm's names.

    Raises UserError for weights of unknown license, such as those of a run, if `license_` is None.
    """
    module = predictor.model.network.module
    cfg = module.pretrained_cfg
    name = cfg.get("architecture") or type(module).__name__
    row = None if Path(source).exists() else load_manifest().get(f"{name}.{cfg.get('tag')}")
    chosen = license_ or (row.license if row else None)
    if chosen is None:
        raise UserError(f"{source}: the license of these weights is not known; give it with --license")
    family = families.get(name)
    details: dict[str, Any] = {
        "Model Type": "Image classification / feature backbone",
        "Model Stats": {
            "Params (M)": f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}",
            "Image size": " x ".join(map(str, predictor.model.config["input_size"][1:])),
            "Classes": str(len(predictor.classes)),
        },
    }
    if family is not None:
        number = family.pretrained_cfg["paper_ids"].removeprefix("arXiv:")
        details["Papers"] = [f"https://arxiv.org/abs/{number}"]
    if row is not None:
        details["Original"] = row.source
        if row.published_top1 is not None:
            details["ImageNet-1k top-1, as published"] = f"{row.published_top1}"
    origin = f"Published weights `{row.name}`, converted" if row else "Trained with tessel"
    return {
        "tags": ["image-classification", "timm", "tessel"],
        "license": chosen.lower(),
        "description": f"`{name}`, an image classifier of tessel {__version__}. {origin}.",
        "details": details,
        "usage": USAGE.format(repository=repository),
    }
