"""timm's augmentation policies: every operation at both ends of its range, and the recipes' policies on many images."""

import numpy as np
import pytest
from miniatures import SIZES, photo
from timm.data.auto_augment import (
    _AUGMIX_TRANSFORMS,
    _RAND_3A,
    _RAND_INCREASING_TRANSFORMS,
    _RAND_TRANSFORMS,
    AugmentOp,
    auto_augment_policy,
)
from timm.data.auto_augment import posterize as timm_posterize

from tessel.train.data.sampler import seed_all
from tessel.train.recipe.load import PACKAGED, load_recipe
from tessel.train.tasks.classify.augment import train_transform
from tessel.train.tasks.classify.options import ClassifyAug, ClassifyData
from tessel.train.tasks.classify.rand_augment import allow_zero_bits, operations, posterize

CFG = {"input_size": (3, 224, 224), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
NAMES = sorted({*_RAND_TRANSFORMS, *_RAND_INCREASING_TRANSFORMS, *_AUGMIX_TRANSFORMS, *_RAND_3A})
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "augmix-m5", "3a", "original", "originalr", "v0", "v0r"]


@pytest.mark.parametrize("bits", range(10))
def test_posterize_keeps_the_highest_bits(bits):
    image = photo(50, 37)
    kept = np.asarray(posterize(image, bits, fillcolor=(0, 0, 0), resample=3))
    assert (kept == (np.asarray(image).astype(int) & (0xFF00 >> min(bits, 8)) & 0xFF)).all()
    if bits:
        assert (kept == np.asarray(timm_posterize(image, bits))).all()


def test_zero_bits_of_a_grayscale_image_are_black():
    assert np.asarray(posterize(photo(5, 4).convert("L"), 0)).tolist() == [[0] * 5] * 4


@pytest.mark.parametrize("magnitude", [0, 10])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_at_the_ends_of_its_range(name, magnitude):
    operation = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams={"img_mean": (9, 9, 9)})
    allow_zero_bits(operation)
    for image in (photo(500, 375), photo(375, 500), photo(1, 1), photo(7, 300)):
        changed = operation(image)
        assert (changed.size, changed.mode) == (image.size, "RGB")


@pytest.mark.parametrize("policy", POLICIES)
def test_posterize_is_found_in_every_kind_of_policy(policy):
    transform = train_transform(ClassifyData(source="digits", aug=ClassifyAug(auto_augment=policy)), CFG)
    found = list(operations(transform))
    assert len(found) >= 3
    assert all(op.aug_fn is posterize for op in found if op.name.startswith("Posterize"))
    assert any(op.aug_fn is posterize for op in found) == (policy != "3a")


def test_timm_itself_is_unchanged():
    train_transform(ClassifyData(source="digits", aug=ClassifyAug(auto_augment="v0")), CFG)
    fresh = [op for policy in auto_augment_policy("v0", {}) for op in policy if op.name.startswith("Posterize")]
    assert fresh and all(op.aug_fn is timm_posterize for op in fresh)


def test_the_strongest_posterize_of_the_recipes_is_black():
    transform = train_transform(ClassifyData(source="digits", aug=ClassifyAug(auto_augment="rand-m10-inc1")), CFG)
    operation = next(op for op in operations(transform) if op.name == "PosterizeIncreasing")
    operation.prob = 1.0
    assert not np.asarray(operation(photo(500, 375))).any()


def policies():
    """One ImageNet recipe for each policy."""
    recipes = {path.stem: load_recipe(path) for path in sorted((PACKAGED / "imagenet").glob("*.yaml"))}
    named = {recipe.data.aug.auto_augment: name for name, recipe in recipes.items()}
    return sorted(name for policy, name in named.items() if policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", policies())
def test_augmentation_of_the_recipes_on_5000_images(name):
    data = load_recipe(f"imagenet/{name}").data
    images = [photo(*size, seed=seed) for seed, size in enumerate(SIZES)]
    transform = train_transform(data, {**CFG, "interpolation": "bicubic"})
    black = 0
    for number in range(5000):
        seed_all(0, 0, number)
        pixels = transform(images[number % len(images)])
        assert pixels.shape == (3, data.size, data.size) and pixels.isfinite().all()
        black += bool((pixels == pixels.flatten(1).amin(1)[:, None, None]).all())
    print(f"{name}: {black} of 5000 images are of one color")
