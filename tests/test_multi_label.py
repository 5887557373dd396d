"""Metrics of several labels per image: average precision, thresholds, and the order of the data set."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.metrics import average_precision_score
from timm.models import create_model

from tessel.predict import load
from tessel.train.distributed.world import World
from tessel.train.tasks.classify.augment import mixing
from tessel.train.tasks.classify.multi_label import MultiLabelMetrics, average_precision, best_threshold
from tessel.train.tasks.classify.options import ClassifyAug
from tessel.train.tasks.export import export_classifier

SCORES = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float32, n, elements=st.integers(0, 9).map(lambda x: x / 10)), hnp.arrays(np.bool_, n)
    )
)


@given(SCORES)
def test_average_precision_is_that_of_scikit_learn(pair):
    scores, right = pair
    if right.any():
        assert average_precision(scores, right) == pytest.approx(average_precision_score(right, scores))
    else:
        assert np.isnan(average_precision(scores, right))


@given(SCORES)
def test_no_threshold_has_a_higher_f1(pair):
    scores, right = pair

    def f1(threshold):
        predicted = scores >= threshold
        return 2 * (predicted & right).sum() / (predicted.sum() + right.sum())

    threshold, best = best_threshold(scores, right)
    if not right.any():
        assert (threshold, best) == (0.5, None)
        return
    assert best == pytest.approx(f1(threshold)) == pytest.approx(max(f1(level) for level in scores))


def test_metrics_do_not_depend_on_the_order_of_batches():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(20, 3)).astype(np.float32))
    targets = torch.from_numpy((rng.random((20, 3)) < 0.4).astype(np.float32))
    targets[:, 2] = 0  # no image has the last label

    def measured(order):
        metrics = MultiLabelMetrics(World(), lambda batch: (batch[0], batch[1]), ["a", "b", "c"])
        for rows in torch.tensor(order).split(6):
            metrics.update(lambda images: images, (logits[rows], targets[rows], rows))
        return metrics

    one, other = measured(list(range(20))), measured(list(range(19, -1, -1)))
    assert one.compute() == pytest.approx(other.compute()) and one.details() == other.details()
    assert (one.predictions()["target"] == targets.numpy()).all()
    expected = [100 * average_precision_score(targets[:, k], logits[:, k]) for k in range(2)]
    assert one.compute()["map"] == pytest.approx(np.mean(expected)), "a label without images does not count"
    assert one.details()["classes"]["average_precision"] == {
        "a": pytest.approx(expected[0]),
        "b": pytest.approx(expected[1]),
        "c": None,
    }
    assert one.details()["thresholds"]["c"] == 0.5 and one.details()["images"]["c"] == 0
    assert json.dumps(one.details(), allow_nan=False)


def test_mixing_mixes_the_targets_of_each_label():
    torch.manual_seed(0)
    np.random.seed(0)
    mix = mixing(ClassifyAug(mixup=1.0), 0.2, 3, multi_label=True)
    assert mix is not None
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    mixed = mix(torch.zeros(2, 3, 4, 4), targets)[1]
    smooth = targets * 0.8 + 0.1
    share = (mixed[0, 0] - smooth[1, 0]) / (smooth[0, 0] - smooth[1, 0])
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * smooth + (1 - share) * smooth.flip(0))


def test_predictions_are_the_labels_above_their_thresholds(tmp_path):
    torch.manual_seed(0)
    model = create_model("test_resnet", num_classes=3).eval()
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))

    def predicted(thresholds):
        facts = {"task": "multilabel", "thresholds": dict(zip("abc", thresholds, strict=True))}
        export_classifier(model, tmp_path / "export", classes=list("abc"), data_config=config, facts=facts)
        return load(tmp_path / "export", device="cpu").predict([image])[0]

    every = predicted([0, 0, 0])
    assert sorted(every.labels) == ["a", "b", "c"] and every.probabilities == sorted(every.probabilities, reverse=True)
    chances = dict(zip(every.labels, every.probabilities, strict=True))
    found = predicted([chances["a"] - 0.01, chances["b"] + 0.01, chances["c"] - 0.01])
    assert sorted(found.labels) == ["a", "c"]
    none = predicted([1, 1, 1])
    assert none.labels == [] and none.summary() == "no label" and none.plot().size == (32, 32)
