"""The digit scenes are deterministic, have valid masks, and show different digits in training and validation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessel.train.data.sources.digit_scenes import MAX_HIDDEN, DigitScenes, covered


@settings(max_examples=15, deadline=None)
@given(split=st.sampled_from(["train", "val"]), index=st.integers(0, 999), side=st.sampled_from([48, 96, 131]))
def test_scenes_are_valid_and_repeatable(split, index, side):
    scene = DigitScenes(split, length=1000, side=side)[index]
    assert scene.image.size == scene.instances.shape == (side, side)
    seen = np.unique(scene.instances)
    assert seen.tolist() == list(range(len(scene.labels) + 1))
    assert 1 <= len(scene.labels) <= 3 and scene.labels.min() >= 0 and scene.labels.max() <= 9
    again = DigitScenes(split, length=1000, side=side)[index]
    assert scene.image.tobytes() == again.image.tobytes() and (scene.instances == again.instances).all()


def test_scenes_differ_between_splits_and_indices():
    train, val = (DigitScenes(split, length=10) for split in ("train", "val"))
    pictures = {scenes[i].image.tobytes() for scenes in (train, val) for i in range(10)}
    assert len(pictures) == 20
    assert len(train.digits) == 1437 and len(val.digits) == 360
    with pytest.raises(IndexError, match="scene 10 of 10"):
        train[10]


def test_digits_may_cover_only_a_small_part_of_others():
    before = np.array([[1, 1, 1, 1, 1, 1, 0, 2]])
    assert not covered(before, np.array([[1, 1, 1, 1, 1, 3, 3, 2]]))
    assert covered(before, np.array([[1, 1, 1, 3, 3, 3, 3, 2]]))
    assert covered(before, np.array([[1, 1, 1, 1, 1, 1, 3, 3]]))
    assert 0.1 < MAX_HIDDEN < 0.5
