"""torchvision's detectors on any backbone of timm or tessel, and the folder that holds a trained one."""

import inspect
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from .... import zoo as zoo  # registers the models with timm
from ....zoo.dense import DenseBackbone, prefix_patterns
from ...errors import UserError
from ...recipe.schema import Dense, Model
from ..dense_backbone import build_backbone, load_initial_backbone
from ..export import load_weights, read_export
from .options import DetectOptions

BODY = "backbone.body."


Found = dict[str, Tensor]


class Pyramid(nn.Module):
    """A dense backbone and its feature pyramid, as torchvision's detectors take them: maps by name, one width."""

    def __init__(self, body: DenseBackbone, channels: int, extra: ExtraFPNBlock):
        super().__init__()
        self.body, self.out_channels = body, channels
        self.fpn = FeaturePyramidNetwork(body.channels, channels, extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: [B, 3, H, W] -> [B, out_channels, H / stride, W / stride] from fine to coarse"""
        return self.fpn(OrderedDict((str(number), level) for number, level in enumerate(self.body(x))))


class _OnBackbone(nn.Module):
    """What the trainer asks a model for, answered by the backbone under the names that its weights have here.

    Labels count from 0 without a background class, for every detector.
    """

    first_label = 0
    backbone: Pyramid

    def forward(self, images: list[Tensor], targets: list[Found] | None = None) -> Any:
        """images: of [3, H, W] in 0..1 each; targets: of boxes [N, 4] (x1, y1, x2, y2), labels [N] and masks [N, H, W].

        In training a mapping of losses; else a list of boxes, labels, scores and masks [N, 1, H, W] in 0..1, in the
        pixels of the images as they came.
        """
        first = self.first_label
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + first} for target in targets]
        found = super().forward(images, targets)
        return found if self.training else [{**one, "labels": one["labels"] - first} for one in found]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            key: prefix_patterns(spec, BODY) for key, spec in self.backbone.body.group_matcher(coarse=coarse).items()
        }

    def no_weight_decay(self) -> set[str]:
        return {BODY + name for name in self.backbone.body.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.body.set_grad_checkpointing(enable)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Only the backbone: what comes after it has other shapes in every batch."""
        self.backbone.compile(*args, **kwargs)


class FasterRCNN(_OnBackbone, detection.FasterRCNN):
    first_label = 1


class MaskRCNN(_OnBackbone, detection.MaskRCNN):
    first_label = 1


class RetinaNet(_OnBackbone, detection.RetinaNet):
    pass


class FCOS(_OnBackbone, detection.FCOS):
    pass


DETECTORS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "retinanet": RetinaNet, "fcos": FCOS}


OURS = {"backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "kwargs", "self"}


def build_detector(model: Model, detect: DetectOptions, *, dense: Dense, size: int, classes: int) -> nn.Module:
    """The detector of a recipe, with the weights of its backbone. Raises UserError for what cannot be built.

    R-CNNs read strides 4 to 32 and a pooled 64; RetinaNet and FCOS strides 8 to 32 and two further maps by
    convolution, RetinaNet's from the backbone, FCOS's from the pyramid. In training images come scaled; in evaluation
    their short side becomes `size`. They are padded to multiples of 32.
    """
    kind, two_stages = DETECTORS[detect.detector], "rcnn" in detect.detector
    body = build_backbone(model, dense, (0, 1, 2, 3) if two_stages else (1, 2, 3))
    load_initial_backbone(body, model, size)
    extra: ExtraFPNBlock = LastLevelMaxPool()
    if not two_stages:
        from_body = detect.detector == "retinanet"
        extra = LastLevelP6P7(body.channels[-1] if from_body else detect.channels, detect.channels)
        extra.use_P5 = not from_body  # torchvision goes by the widths, which may be equal by chance
    check_kwargs(kind, detect)
    options = {"image_mean": body.pretrained_cfg["mean"], "image_std": body.pretrained_cfg["std"], **anchors(detect)}
    options |= {"min_size": size, "max_size": detect.max_size, "_skip_resize": True, **detect.kwargs}
    try:
        detector = kind(Pyramid(body, detect.channels, extra), num_classes=classes + kind.first_label, **options)
    except (TypeError, ValueError, AssertionError) as error:
        said = f"task.detect.channels={detect.channels} and task.detect.kwargs={detect.kwargs}"
        raise UserError(f"{said} with {detect.detector}: {error}") from error
    heads = (
        [detector.rpn.head, detector.roi_heads.box_predictor, detector.roi_heads.mask_predictor]
        if two_stages
        else [detector.head]
    )
    for head in filter(None, heads):
        # boxes are computed in what a head hands out: half precision is pixels off
        head.register_forward_hook(lambda module, args, out: tree_map_only(Tensor, Tensor.float, out))
    return detector


def check_kwargs(kind: type[nn.Module], detect: DetectOptions) -> None:
    """Raise UserError for what the detector does not take: torchvision looks at few values before it uses them."""
    given = inspect.signature(kind.__mro__[2].__init__).parameters
    defaults = {key: one.default for key, one in given.items() if type(one.default) in (int, float)}
    defaults = {key: default for key, default in defaults.items() if key not in OURS}
    if "bbox_reg_weights" in given:
        defaults["bbox_reg_weights"] = None
    for key, value in detect.kwargs.items():
        if key not in defaults:
            raise UserError(
                f"task.detect.kwargs: {key} is no argument of {detect.detector}, which takes "
                f"{', '.join(sorted(defaults))}"
            )
        if (wanted := _wanted(key, defaults[key], value)) is not None:
            raise UserError(f"task.detect.kwargs: {key}={value!r} with {detect.detector}; it must be {wanted}")


def _wanted(key: str, default: Any, value: Any) -> str | None:
    """What the value should be where it is something else."""
    if default is None:
        fits = value is None or isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_positive, value))
        return None if fits else "four numbers above 0"
    if isinstance(default, int):
        return None if type(value) is int and value > 0 else "a whole number above 0"
    if key.endswith(("_thresh", "_fraction")):
        return None if type(value) in (int, float) and 0 <= value <= 1 else "a number from 0 to 1"
    return None if _is_positive(value) else "a number above 0"


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def anchors(detect: DetectOptions) -> dict[str, Any]:
    """The anchor generator as the argument that the detector takes; none where torchvision's own is wanted."""
    if detect.anchor is None:
        return {}
    ratios, sides = ((0.5, 1.0, 2.0),) * 5, [detect.anchor * 2**level for level in range(5)]
    if detect.detector == "retinanet":
        octaves = tuple(tuple(int(side * 2 ** (third / 3)) for third in range(3)) for side in sides)
        return {"anchor_generator": AnchorGenerator(octaves, ratios)}
    return {"rpn_anchor_generator": AnchorGenerator(tuple((side,) for side in sides), ratios)}


def load(path: str | Path) -> nn.Module:
    """The detector that a run exported into the folder `path`, in evaluation mode, with the attribute `classes`.

    It takes a list of images [3, H, W] in 0..1 and returns for each boxes [N, 4] in its pixels, labels (indices of
    `classes`), scores, and with Mask R-CNN masks. Raises UserError where the folder holds no detector.
    """
    path = Path(path)
    parts = read_export(path, "detect", {"dense": Dense, "detect": DetectOptions})
    size, classes = parts["size"], parts["classes"]
    detector: Any = build_detector(
        parts["model"], parts["detect"], dense=parts["dense"], size=size, classes=len(classes)
    )
    load_weights(detector, path)
    detector.classes = classes
    return detector.eval()
