"""The charts of the report: their texts, axes, markers and matrices."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from report_run import EVERY, make_run

from tessel.train.report import classify, curves, dense
from tessel.train.report.page import NARROW, STYLE
from tessel.train.report.runs import read_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the digits with three mistakes and an untrained model."""
    return make_run(tmp_path_factory.mktemp("runs") / "demo", wrong=[7, 90, 200])


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(finished, tmp_path / "demo")


@pytest.mark.parametrize("count", [1, curves.FEW_POINTS + 1])
def test_few_points_have_markers(run, count):
    """A line through a single point is invisible."""
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    lines = (json.dumps(line | {"step": step}) + "\n" for step in range(count))
    (run / "metrics.jsonl").write_text("".join(lines))
    record = read_run(run)
    figures = [curves.draw_loss([record]), *(curves.draw_key([record], key) for key in curves.TITLES)]
    for figure in figures:
        assert (figure.axes[0].lines[0].get_marker() == "None") == (count > 1)


@pytest.mark.parametrize(
    ("values", "start"), [([12.0, 88.0], 0), ([81.0, 84.5], 70), ([99.2], 80), ([40.0], 0), ([60.0, 300.0], 0)]
)
def test_an_axis_starts_at_0_or_says_where(finished, values, start):
    evals = [{"step": 5 * n, "top1": value} for n, value in enumerate(values, 1)]
    record = dataclasses.replace(read_run(finished), evals=evals)
    (axes,) = curves.draw_metric([record]).axes
    assert axes.get_ylim()[0] == start and axes.get_ylim()[1] > max(values)
    assert axes.get_ylabel() == ("%" if start == 0 else f"% (axis starts at {start})")
    for key in curves.TITLES:
        assert curves.draw_key([record], key).axes[0].get_ylim()[0] == 0


def texts_outside(figure):
    """Texts of a figure that are cut off by its edge, and pairs that overlap."""
    figure.canvas.draw()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True):
            label.set_visible(low <= place <= high)  # matplotlib has ticks beyond the axis, which it does not draw
    width, height = figure.bbox.size
    drawn = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn]
    outside = [name for name, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]
    overlap = [
        (one[0], other[0])
        for one, other in itertools.combinations(boxes, 2)
        if min(one[1].x1, other[1].x1) - max(one[1].x0, other[1].x0) > 1
        and min(one[1].y1, other[1].y1) - max(one[1].y0, other[1].y0) > 1
    ]
    return outside, overlap


@pytest.mark.parametrize("classes", [["a", "b"], [f"a long class name {n}" for n in range(20)]])
def test_texts_of_charts_are_whole_and_do_not_overlap(finished, classes):
    counts = np.random.default_rng(0).integers(1, 30, (len(classes), len(classes)))
    record = read_run(finished)
    with rc_context(STYLE):
        figures = [
            classify.draw_recall(counts, classes),
            classify.draw_confusion(counts, classes),
            dense.draw_classes({"iou": dict.fromkeys(classes, 30.0)}, classes),
            curves.draw_loss([record]),
            curves.draw_metric([record, record]),
            *(curves.draw_key([record], key) for key in curves.TITLES),
        ]
        for figure in figures:
            assert figure.get_figwidth() <= NARROW
            FigureCanvasAgg(figure)
            assert texts_outside(figure) == ([], [])


def test_the_value_beside_the_curve_is_that_of_the_export(finished):
    record = read_run(finished)
    early = dataclasses.replace(record, done={"step": EVERY, "top1": 82.5, "count": 360})
    for run, text in ((record, "90.0"), (early, "82.5"), (dataclasses.replace(record, done=None), "90.0")):
        with rc_context(STYLE):
            (axes,) = curves.draw_metric([run]).axes
        assert [one.get_text() for one in axes.texts] == [text]


@pytest.mark.parametrize(("size", "written"), [(3, 3), (20, 20), (30, 0), (100, 0)])
def test_confusion_matrices_of_every_size(size, written):
    counts, names = 5 * np.eye(size, dtype=int), ["a rather long name"] * size
    (matrix,), (recall,) = classify.draw_confusion(counts, names).axes, classify.draw_recall(counts, names).axes
    assert [text.get_text() for text in matrix.texts] == ["5"] * written
    assert len(matrix.get_xticklabels()) == (size if size <= classify.MAX_NAMED else 0)
    np.testing.assert_array_equal(recall.lines[1].get_xdata(), 100)


def test_confusion_with_an_empty_class_and_one_always_wrong():
    counts, names = np.array([[4, 0, 0], [0, 0, 0], [1, 3, 0]]), list("abc")
    (matrix,), (recall,) = classify.draw_confusion(counts, names).axes, classify.draw_recall(counts, names).axes
    cells = {text.get_position(): text.get_text() for text in matrix.texts}
    assert cells == {(0, 0): "4", (0, 2): "1", (1, 2): "3"}
    np.testing.assert_array_equal(recall.lines[1].get_xdata(), [100, np.nan, 0])
    assert recall.get_xlim()[0] < 0, "the marker at 0 % is inside"
