"""Augmentation of a batch on the device: random erasing, then mixing, with the seed of the update."""

import pytest
import torch
import trainer

from tessel.train.data.sampler import seed_all
from tessel.train.distributed.world import World
from tessel.train.recipe.load import load_recipe
from tessel.train.tasks.classify.augment import erasing, train_transform
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


@pytest.mark.parametrize("late", [False, True])
def test_order_of_erasing_and_mixing(tmp_path, late):
    aug = {"erasing": 1.0, "mixup": 0.5, "cutmix": 0.0, "erase_after_mixing": late}
    data = {"source": "digits", "aug": aug}
    recipe = trainer.write_recipe(
        tmp_path / "tiny.yaml", data=data, model={"name": "test_resnet", "drop_path_rate": None}
    )
    task, seen = ClassifyTask(load_recipe(recipe), World()), []
    assert task.erasing and task.mixing

    def model(images):
        seen.append(images.clone())
        return torch.zeros(len(images), 10)

    seed_all(0, devices=True)
    images = torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    task.loss(model, [images.clone(), torch.arange(4), torch.arange(4)])
    seed_all(0, devices=True)
    if late:
        mixed = task.mixing(images.clone(), torch.arange(4))[0]
        expected = task.erasing(mixed.clone())
        assert (expected != mixed).flatten(1).any(1).all()
    else:
        erased = task.erasing(images.clone())
        assert (erased != images).flatten(1).any(1).all()
        expected = task.mixing(erased, torch.arange(4))[0]
    assert torch.equal(seen[0], expected)
