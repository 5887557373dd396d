"""The augmentation of the dense recipes on many images of natural size (classification: test_rand_augment.py)."""

import miniatures
import pytest
import torch

from tessel.train.data.loader import FallbackSample, SeededDataset
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.registry import open_dataset
from tessel.train.tasks.detect.augment import TrainTransform
from tessel.train.tasks.segment.augment import train_transform


def samples(name, root, transform, count):
    """`count` transformed training samples of a recipe, each with other random numbers."""
    dataset = SeededDataset(open_dataset(load_recipe(name, [f"data.root={root}"]), "train"), transform, seed=0)
    for number in range(count):
        sample = dataset[number, number % len(dataset.dataset)]
        assert not isinstance(sample, FallbackSample), sample
        yield sample


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ade20k/cswin_tiny_upernet", "ade20k/cswin_large_upernet_640"])
def test_crops_of_segmentation(name, tmp_path):
    data = load_recipe(name).data
    root = miniatures.ade20k(tmp_path, train=8)
    for (image, size), mask, _ in samples(name, root, train_transform(data), 400):
        assert image.shape == (3, data.size, data.size) and image.dtype == torch.uint8
        assert size.shape == (2,) and size.min() > 0 and size.max() <= data.size
        assert mask.shape == (data.size, data.size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco/mask_rcnn_1x_litv2_small", "coco/mask_rcnn_3x_tessel_davit_tiny"])
def test_images_and_objects_of_detection(name, tmp_path):
    recipe = load_recipe(name)
    root, sides = miniatures.coco(tmp_path, train=8), recipe.task.detect.min_size or (recipe.data.size,)
    for image, target, _ in samples(name, root, TrainTransform(recipe), 150):
        height, width = image.shape[1:]
        # torchvision rounds a side down, so one that is computed as 479.99 pixels becomes 479
        assert any(0 <= side - min(height, width) <= 1 for side in sides) or (
            0 <= recipe.task.detect.max_size - max(height, width) <= 1
        )
        assert image.dtype == torch.uint8
        boxes = target["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes[:, 2].le(width).all() and boxes[:, 3].le(height).all()
        assert len(boxes) == len(target["labels"]) == len(target["masks"])
        assert target["masks"].shape[1:] == (height, width)
