"""Augmentation: from a PIL image or an array to a tensor in 0..1 or of uint8 in the loader's workers; normalization,
random erasing and mixing of a batch on the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch.utils.data import default_collate
from torchvision.transforms import Compose, InterpolationMode, RandomAffine
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ...errors import UserError
from .channels import channel_steps
from .options import ClassifyAug, ClassifyData
from .rand_augment import allow_zero_bits
from .tensor_crop import TensorCrop

ImageTransform = Callable[[Any], torch.Tensor]


def image_only(transform: ImageTransform, image: Any, target: Any) -> tuple[torch.Tensor, Any]:
    """Transform the image and leave the target unchanged."""
    return transform(image), target


def train_transform(data: ClassifyData, pretrained_cfg: Any) -> ImageTransform:
    """Affine jitter, then timm's training pipeline: crop, flips, policy. -> uint8 [C, size, size]

    It takes a PIL image, or with data.decoder=torchcodec a uint8 tensor [3, H, W]; for a model of other than 1 or 3
    channels an array [H, W, C], which gives float32.
    """
    aug, cfg = data.aug, input_config(data, pretrained_cfg)
    before, after = channel_steps(cfg["input_size"][0])
    try:
        policy: Any = create_transform(
            cfg["input_size"],
            is_training=True,
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            vflip=aug.vflip,
            color_jitter=aug.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=aug.auto_augment,
            interpolation=cfg["interpolation"],
            mean=_three(cfg["mean"]),  # fills what a policy's geometric operations uncover
            normalize=False,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"data.aug.auto_augment={aug.auto_augment!r} is not a policy of timm; see timm.data.auto_augment"
        ) from error
    allow_zero_bits(policy)
    if data.decoder == "pil":
        return Compose([*before, *_affine(aug), policy, *after])
    policy.transforms[0] = TensorCrop(policy.transforms[0])
    affine = [to_pil_image, *_affine(aug), pil_to_tensor] if _affine(aug) else []
    return Compose([*affine, policy])


def eval_transform(data: ClassifyData, pretrained_cfg: Any) -> ImageTransform:
    """Resize, centre crop. -> uint8 [C, size, size]; of an array float32"""
    cfg = input_config(data, pretrained_cfg)
    before, after = channel_steps(cfg["input_size"][0])
    cfg["interpolation"] = {"random": "bicubic"}.get(cfg["interpolation"], cfg["interpolation"])
    return Compose([*before, create_transform(**cfg, normalize=False), *after])


def input_config(data: ClassifyData, pretrained_cfg: Any) -> dict[str, Any]:
    """timm's input_size, interpolation, mean, std, crop_pct, crop_mode: from the recipe, else from the model.

    The number of channels is that of the model's input_size. For one, mean and std are the averages of the model's
    three.
    """
    cfg = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else pretrained_cfg.to_dict()
    channels = (cfg.get("input_size") or (3,))[0]
    wanted = {
        "input_size": (channels, data.size, data.size),
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
        "mean": data.mean,
        "std": data.std,
    }
    found = resolve_data_config(
        {key: value for key, value in wanted.items() if value is not None}, pretrained_cfg=dict(cfg)
    )
    if channels == 1:
        found |= {key: (sum(found[key]) / len(found[key]),) for key in ("mean", "std")}
    return found


class Normalizer:
    """Images [B, C, H, W], uint8 or float32 in 0..1, to (image - mean) / std in float32 on the device.

    The result has the same bits on every device. Workers hand out uint8, a quarter of the bytes to pass between
    processes and to copy to the device.
    """

    def __init__(self, config: Mapping[str, Any], device: torch.device):
        """config: mean and std per channel, see `input_config`."""
        self.mean, self.std = (torch.tensor(config[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
        # a tensor, because on a GPU torch multiplies by the reciprocal of a number, which rounds differently
        self.white = torch.tensor(255.0, device=device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if images.dtype == torch.uint8:
            pixels.div_(self.white)
        return pixels.sub_(self.mean).div_(self.std)


def collate(samples: list[Any]) -> list[Any]:
    """The batch of samples (image [C, H, W], target, index), images in the memory format channels_last.

    So lie the images that come from PIL; `default_collate` would transpose each of them.
    """
    images, *others = default_collate([(image.permute(1, 2, 0), *others) for image, *others in samples])
    return [images.permute(0, 3, 1, 2), *others]


def erasing(aug: ClassifyAug, device: torch.device) -> RandomErasing | None:
    """Random erasing (Zhong et al., arXiv 1708.04896) of a normalized batch, in place on `device`, with noise; or None.

    It uses the generators of `random` and of the device, which the engine seeds for every micro-batch.
    """
    return RandomErasing(aug.erasing, mode="pixel", device=str(device)) if aug.erasing else None


def mixing(aug: ClassifyAug, smoothing: float, num_classes: int, *, multi_label: bool = False) -> Mixup | None:
    """Mixup and cutmix of a batch with soft targets, label smoothing included; None if both are off.

    multi_label: targets are [B, num_classes] instead of class indices.
    """
    if not (aug.mixup or aug.cutmix):
        return None
    return Mixup(
        mixup_alpha=aug.mixup,
        cutmix_alpha=aug.cutmix,
        prob=aug.mix_prob,
        switch_prob=aug.switch_prob,
        label_smoothing=smoothing,
        num_classes=num_classes,
        multi_label=multi_label,
    )


def _three(values: Sequence[float]) -> tuple[float, ...]:
    """The values of three channels: gray images are augmented as RGB images."""
    return tuple(values) * (3 if len(values) == 1 else 1)


def _affine(aug: ClassifyAug) -> list[RandomAffine]:
    if not (aug.rotate or aug.translate or aug.zoom or aug.shear):
        return []
    return [
        RandomAffine(
            aug.rotate,
            translate=(aug.translate, aug.translate),
            scale=(1 - aug.zoom, 1 + aug.zoom),
            shear=aug.shear or None,
            interpolation=InterpolationMode.BILINEAR,
        )
    ]
