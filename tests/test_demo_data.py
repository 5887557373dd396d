"""The digits data set: its images, its splits and its errors."""

import pickle
import sys

import numpy as np
import pytest

from tessel.train.data.sources.digits import load_digits
from tessel.train.errors import UserError

SIZES = {"train": 1437, "val": 360}


@pytest.fixture(scope="module")
def splits():
    return {split: load_digits(split) for split in SIZES}


@pytest.mark.parametrize("split", SIZES)
def test_items_are_upsampled_rgb_digits(splits, split):
    data = splits[split]
    assert len(data) == SIZES[split]
    assert data.classes == list("0123456789")
    image, target = data[3]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert type(target) is int and target == data.targets[3]
    low, high = np.asarray(image).min(), np.asarray(image).max()
    assert low < 30 and high > 225, "ink and paper use the whole range"


def test_upsampling_keeps_the_digit(splits):
    data = splits["val"]
    for index in range(0, 360, 40):
        shrunk = np.asarray(data[index][0].convert("L"), dtype=float).reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(shrunk.ravel(), data.pixels[index].ravel())[0, 1] > 0.97


def test_splits_are_stratified(splits):
    train, val = (np.bincount(splits[split].targets, minlength=10) for split in SIZES)
    np.testing.assert_array_less(np.abs(val - 0.2 * (train + val)), 1)


def test_splits_do_not_depend_on_the_seed(splits):
    np.random.seed(7)
    again = load_digits("val")
    assert again.targets == splits["val"].targets
    np.testing.assert_array_equal(again.pixels, splits["val"].pixels)


def test_splits_partition_the_source(splits):
    from sklearn.datasets import load_digits

    def keys(pixels):
        return sorted(image.astype(np.uint8).tobytes() for image in pixels)

    # the source holds no two equal images, so equal lists of bytes mean disjoint and complete
    parts = np.concatenate([splits["train"].pixels, splits["val"].pixels])
    ink, _ = load_digits(return_X_y=True)
    source = keys((ink * (255 / 16)).round())
    assert len(set(source)) == len(source) == 1797
    assert keys(parts) == source


def test_data_set_can_be_pickled_for_loader_workers(splits):
    copy = pickle.loads(pickle.dumps(splits["val"]))
    assert copy[5][0].tobytes() == splits["val"][5][0].tobytes()


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="split='test'.*'train' or 'val'"):
        load_digits("test")


def test_missing_scikit_learn_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'tessel\[train\]'"):
        load_digits("train")
