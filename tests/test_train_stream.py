"""The stream of samples: its order does not depend on the processes, and its position is the loader's only state."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import trainer

from tessel.train.data.loader import SeededDataset
from tessel.train.data.sampler import GlobalBatchSampler, seed_all
from tessel.train.distributed.world import World
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.plan import plan
from tessel.train.recipe.registry import open_dataset, task_spec
from tessel.train.tasks.classify.augment import image_only, train_transform

STEPS = 12  # updates of 8 samples; an epoch has 36


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return trainer.draw_folder(tmp_path_factory.mktemp("stream"))


class RecordRandomNumbers:
    """Transform an image; also return numbers of the three random generators from before and after the transform."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image, target):
        before = self.next_numbers()
        image, target = self.transform(image, target)
        return image, (target, before, self.next_numbers())

    def next_numbers(self):
        return torch.tensor(
            [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64)], dtype=torch.double
        )


def stream(root, *overrides, workers=0, start=0):
    """Every micro-batch from update `start` on, as lists of tensors. Each call seeds the generators differently."""
    aug = {"repeated_aug": 3, "erasing": 0.5, "auto_augment": "rand-m9-mstd0.5-n2", "scale": [0.3, 1.0], "mixup": 0.0}
    aug |= {"cutmix": 0.0, "hflip": 0.5}
    path = root / f"{workers}-{start}.yaml"
    recipe = load_recipe(
        trainer.write_recipe(path, data={"root": str(root), "aug": aug, "workers": workers}, sched={"steps": STEPS}),
        overrides,
    )
    seed_all(1000 + start + workers)
    task = task_spec(recipe).build(recipe, World())
    task.build_model()
    task.train_transform = RecordRandomNumbers(task.train_transform)
    batches = task.train_batches(plan(recipe, samples=task.samples, world_size=1), start)
    try:
        found = []
        for images, (labels, *numbers), index in batches:
            found.append([images, *numbers, labels, index])
            torch.rand(3), random.random(), np.random.rand()
        return found
    finally:
        batches.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2, 5])
def test_batches_and_random_numbers_are_equal_from_any_start(root, workers, start):
    """Without and with loader workers; from the beginning, within the first epoch and within the second."""
    whole = stream(root)
    assert len(whole) == 2 * STEPS
    rest = stream(root, workers=workers, start=start)
    assert len(rest) == 2 * (STEPS - start)
    for left, right in zip(whole[2 * start :], rest, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_no_two_samples_get_the_same_random_numbers(root):
    """This holds for two copies of an image in a batch and for an image in two epochs, with all three generators."""
    whole = stream(root)
    sample_numbers = torch.cat([batch[1] for batch in whole])
    assert len(sample_numbers) == 8 * STEPS
    assert all(len(column.unique()) == len(sample_numbers) for column in sample_numbers.T)
    index = torch.cat([batch[4] for batch in whole])
    assert len(index.unique()) < len(index) / 2  # repeated augmentation, and a second epoch
    images = torch.cat([batch[0] for batch in whole]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    assert not any(torch.equal(one[1], other[1]) for one, other in zip(whole, stream(root, "run.seed=1"), strict=True))


def test_order_does_not_depend_on_the_number_of_processes():
    def stream(rank, world_size, start=0):
        accumulate = 4 // world_size
        sizes = {"micro_batch": 3, "accumulate": accumulate, "rank": rank, "world_size": world_size}
        order = GlobalBatchSampler(length=17, seed=5, start=start, stop=120, **sizes)
        flat = [key for keys in order for key in keys]
        return [flat[at : at + 3 * accumulate] for at in range(0, len(flat), 3 * accumulate)]

    whole = [key for step in stream(0, 1) for key in step]
    assert [key[0] for key in whole] == sorted(key[0] for key in whole)
    for epoch in range(7):
        assert sorted(index for number, index in whole if number == epoch) == list(range(17))
    assert whole[:17] != [(0, index) for index in range(17)] and whole[:17] != [(0, i) for _, i in whole[17:34]]
    for world_size in (2, 4):
        ranks = [stream(rank, world_size) for rank in range(world_size)]
        assert [key for step in zip(*ranks, strict=True) for part in step for key in part] == whole
    assert [key for step in stream(0, 1, start=48) for key in step] == whole[48:]


def test_samples_depend_only_on_their_key(tmp_path, root):
    recipe = load_recipe(trainer.write_recipe(tmp_path / "keys.yaml", data={"root": str(root)}))
    dataset = SeededDataset(
        open_dataset(recipe, "train"),
        partial(image_only, train_transform(recipe.data, {"input_size": (3, 32, 32)})),
        seed=1,
    )
    keys = [(epoch, index) for epoch in range(2) for index in (0, 7, 20)]
    first = {key: dataset[key][0] for key in keys}
    seed_all(99)
    assert all(torch.equal(dataset[key][0], first[key]) for key in reversed(keys))
    assert not torch.equal(first[0, 7], first[1, 7])

    class OneImage:
        def __getitem__(self, index):
            return None, 0

    numbers = SeededDataset(OneImage(), lambda image, target: (torch.rand(1), target), seed=1)
    assert len({float(numbers[key][0]) for key in keys}) == len(keys)
