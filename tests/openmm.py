"""Helpers of the mmsegmentation tests: a folder with ADE20K's layout, and a small config for MMEngine's Runner."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image
from torch import Tensor

from tessel.train.data.sources.digit_scenes import DigitScenes
from tessel.zoo import to_published
from tessel.zoo.dense import DenseBackbone


def draw_ade(root: Path, *, train: int = 6, val: int = 3, side: int = 64) -> Path:
    """Write `root/{images,annotations}/{training,validation}`: digits are classes 1 to 10; the background is 0."""
    for split, folder, count in (("train", "training", train), ("val", "validation", val)):
        scenes = DigitScenes(split, length=count, side=side)
        for kind in ("images", "annotations"):
            (root / kind / folder).mkdir(parents=True)
        for index in range(count):
            scene = scenes[index]
            scene.image.save(root / "images" / folder / f"{index}.jpg")
            class_of_instance = np.concatenate([[0], scene.labels + 1]).astype(np.uint8)
            Image.fromarray(class_of_instance[scene.instances]).save(root / "annotations" / folder / f"{index}.png")
    return root


def config(root: Path, work: Path, **overrides: Any) -> dict[str, Any]:
    """Six iterations of two images: a tiny backbone, a SegFormer head, an auxiliary head, two checkpoints."""
    norm, channels = {"type": "BN"}, DenseBackbone("cswin_atto").channels
    load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "reduce_zero_label": True}]

    def loader(split: str, sampler: str, pipeline: list[dict]) -> dict[str, Any]:
        folders = {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"}
        data = {"type": "ADE20KDataset", "data_root": str(root), "data_prefix": folders, "pipeline": pipeline}
        picks = {"type": sampler, "shuffle": sampler == "InfiniteSampler"}
        return {"batch_size": 2, "num_workers": 0, "sampler": picks, "dataset": data}

    head = {"num_classes": 150, "norm_cfg": norm, "align_corners": False, "dropout_ratio": 0}
    loss = {"type": "CrossEntropyLoss", "avg_non_ignore": True}
    return {
        "default_scope": "mmseg",
        "work_dir": str(work),
        "experiment_name": work.name,
        "model": {
            "type": "EncoderDecoder",
            "data_preprocessor": {"type": "SegDataPreProcessor", "size": (64, 64), "std": [60.0] * 3},
            "backbone": {"type": "TesselBackbone", "name": "cswin_atto"},
            "decode_head": {
                "type": "SegformerHead",
                "in_channels": channels,
                "in_index": [0, 1, 2, 3],
                "channels": 16,
                "loss_decode": loss,
                **head,
            },
            "auxiliary_head": {
                "type": "FCNHead",
                "in_channels": channels[2],
                "in_index": 2,
                "channels": 8,
                "loss_decode": {**loss, "loss_weight": 0.4},
                **head,
            },
            "test_cfg": {"mode": "whole"},
        },
        "train_dataloader": loader("training", "InfiniteSampler", [*load, {"type": "PackSegInputs"}]),
        "val_dataloader": loader("validation", "DefaultSampler", [*load, {"type": "PackSegInputs"}]),
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 6, "val_interval": 3},
        "val_cfg": {"type": "ValLoop"},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 2e-3}},
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 3},
            "logger": {"type": "LoggerHook", "log_metric_by_epoch": False},
        },
        "randomness": {"seed": 0},
        "log_level": "ERROR",
        **overrides,
    }


def published_backbone(own: Mapping[str, Tensor], prefix: str, name: str = "van_atto") -> dict[str, Tensor]:
    """The weights of a dense VAN below `prefix`, with the paper's names."""
    body = {k.removeprefix(f"{prefix}body."): t for k, t in own.items() if k.startswith(f"{prefix}body.")}
    classifier = timm.create_model(name, num_classes=2).state_dict()
    state = to_published(name, classifier | body)
    assert not any(key.startswith(f"{prefix}norms.") for key in own)
    state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    return {f"backbone.{key}": tensor.clone() for key, tensor in state.items()}
