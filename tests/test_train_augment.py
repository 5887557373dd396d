"""Augmentation of a batch on the device: random erasing, then mixing, with the seed of the update."""

import pytest
import torch
import trainer
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision.transforms import functional as F

from tessel.train.data.sampler import seed_all
from tessel.train.distributed.world import World
from tessel.train.recipe.load import load_recipe
from tessel.train.tasks.classify.augment import (
    Normalizer,
    erasing,
    eval_transform,
    input_config,
    train_transform,
)
from tessel.train.tasks.classify.options import ClassifyAug, ClassifyData
from tessel.train.tasks.classify.task import ClassifyTask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def test_loader_workers_do_not_erase():
    image = trainer.open_source("digits", "train")[0][0]
    config = {"input_size": (3, 32, 32)}
    plain, erased = (
        train_transform(ClassifyData(source="digits", size=32, aug=ClassifyAug(erasing=p)), config)(image)
        for p in (0.0, 1.0)
    )
    assert torch.equal(plain, erased)


@pytest.mark.parametrize("device", DEVICES)
def test_erasing_differs_between_images_and_repeats_with_the_seed(device):
    erase = erasing(ClassifyAug(erasing=0.25), torch.device(device))
    assert erase and erasing(ClassifyAug(), torch.device(device)) is None

    def erased(*key):
        seed_all(*key, devices=True)
        return erase(torch.full((512, 3, 32, 32), 9.0, device=device).to(memory_format=torch.channels_last))

    batch = erased(1, 2)
    changed = batch != 9
    rows = changed.flatten(1).any(1)
    assert 0.18 < rows.float().mean() < 0.32
    assert torch.equal(erased(1, 2), batch) and not torch.equal(erased(1, 3), batch)
    areas = changed[rows][:, 0].flatten(1).float().mean(1)
    assert areas.min() > 0.01 and areas.max() < 0.37 and len(areas.unique()) > 50
    for mask in changed[rows][:20, 0]:  # the erased regions are rectangles
        height, width = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == height * width
    noise = batch[changed]
    assert noise.mean().abs() < 0.05 and abs(noise.std() - 1) < 0.05 and batch.device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_normalization_on_the_device_has_the_bits_of_one_in_the_worker(device):
    """That of torchvision, which earlier versions applied to each image in its worker."""
    values = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    config = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    expected = F.normalize(F.to_tensor(values.permute(1, 2, 0).numpy()), config["mean"], config["std"])
    normalize = Normalizer(config, torch.device(device))
    bytes_, floats = values[None], F.to_tensor(values.permute(1, 2, 0).numpy())[None]
    for batch in (bytes_, bytes_.to(memory_format=torch.channels_last), floats):
        before = batch.clone()
        found = normalize(batch.to(device))
        assert found.is_contiguous() and torch.equal(found.cpu(), expected[None]) and torch.equal(batch, before)


def test_transforms_hand_out_the_pixels_as_bytes():
    image = trainer.open_source("digits", "train")[0][0].convert("RGB").resize((40, 32))
    data = ClassifyData(source="digits", size=32, crop_pct=1.0)
    config = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    published = create_transform(**input_config(data, config))  # normalizes
    for transform in (train_transform, eval_transform):
        pixels = transform(data, config)(image)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 32, 32)
        assert torch.equal(Normalizer(config, torch.device("cpu"))(pixels[None])[0], published(image))


@pytest.mark.parametrize("late", [False, True])
def test_order_of_erasing_and_mixing(tmp_path, late):
    aug = {"erasing": 1.0, "mixup": 0.5, "cutmix": 0.0, "erase_after_mixing": late}
    data = {"source": "digits", "aug": aug}
    recipe = trainer.write_recipe(
        tmp_path / "tiny.yaml", data=data, model={"name": "test_resnet", "drop_path_rate": None}
    )
    task, seen = ClassifyTask(load_recipe(recipe), World()), []
    task.build_model()
    assert task.erasing and task.mixing

    def model(images):
        seen.append(images.clone())
        return torch.zeros(len(images), 10)

    seed_all(0, devices=True)
    images = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    task.loss(model, [images, torch.arange(4), torch.arange(4)])
    seed_all(0, devices=True)
    images = task.normalize(images)
    if late:
        mixed = task.mixing(images.clone(), torch.arange(4))[0]
        expected = task.erasing(mixed.clone())
        assert (expected != mixed).flatten(1).any(1).all()
    else:
        erased = task.erasing(images.clone())
        assert (erased != images).flatten(1).any(1).all()
        expected = task.mixing(erased, torch.arange(4))[0]
    assert torch.equal(seen[0], expected)
