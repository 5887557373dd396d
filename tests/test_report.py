"""The report: its sections, what it leaves out and why, and its code."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
import trainer
from matplotlib.figure import Figure
from PIL import Image
from report_run import EVERY, STEPS, make_run, save_predictions

from tessel.train.data.sources.digits import load_digits
from tessel.train.distributed.world import World
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.registry import task_spec
from tessel.train.report import __main__ as report
from tessel.train.report import attention_maps, classify, curves, dense
from tessel.train.report.page import STYLE, duration
from tessel.train.report.runs import RunRecord, read_run

SECTIONS = {
    "Training": ["loss", "metric", "lr", "grad_norm", "images_per_second"],
    "Confusion": ["confusion", "recall"],
    "Hardest images": [],
    "What the mixers attended to": ["attention"],
    "Use this model": [],
}
PICTURES = sum(SECTIONS.values(), [])


@pytest.fixture(autouse=True, scope="module")
def coarse_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "savefig.dpi", 40)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the digits with three mistakes and an untrained model."""
    return make_run(tmp_path_factory.mktemp("runs") / "demo", wrong=[7, 90, 200])


@pytest.fixture(scope="module")
def page(finished):
    assert report.main([str(finished)]) == 0
    return Page(finished / "report" / "index.html")


@pytest.fixture
def run(finished, page, tmp_path):
    """A copy of the run and its report, to be damaged."""
    return shutil.copytree(finished, tmp_path / "demo")


@pytest.fixture
def undrawn(monkeypatch):
    """Skip the drawing in tests of the text."""
    for module in (classify, curves):
        monkeypatch.setattr(module, "picture", lambda folder, name, alt, draw: f"<i>{name}</i>")


class Page(HTMLParser):
    """The parsed page: texts by element, text by section, links. Asserts that all elements are closed."""

    VOID = {"meta", "img", "source", "br"}

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.texts, self.sections, self.links = [], {}, {}, []
        self.feed(self.source)
        assert not self.open, "elements left open"

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        self.texts.setdefault(inside, []).append(data)
        if inside == "p":
            self.sections[self.texts["h2"][-1]] = data


def test_the_page_has_all_sections(page):
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.texts["h2"] == list(SECTIONS)
    assert not [text for text in page.sections.values() if "Left out" in text]


def test_the_page_is_self_contained(page):
    # one chart for light screens and one for dark, and the hardest images
    assert len(page.links) == 2 * len(PICTURES) + classify.MAX_IMAGES
    for link in page.links:
        head, _, data = link.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert not re.search("https?:|//|url\\(|@import", re.sub('data:image/png;base64,[^"]*', "", page.source)), (
        page.source[:200]
    )


def test_the_pictures_are_beside_the_page(page, finished):
    names = sorted(path.name for path in (finished / "report").iterdir())
    assert names == sorted([f"{name}{ending}.png" for name in PICTURES for ending in ("", "-dark")] + ["index.html"])
    for light in PICTURES:
        files = [(finished / "report" / f"{light}{ending}.png").read_bytes() for ending in ("", "-dark")]
        assert files[0] != files[1]
        assert [base64.b64encode(file).decode() in page.source for file in files] == [True, True]


def test_the_header_describes_the_run(page):
    parameters = sum(p.numel() for p in timm.create_model("biformer_atto", num_classes=10).parameters())
    assert page.texts["b"][:4] == ["99.2 %", f"{parameters / 1e6:.2f} M", "5 s", "20"]
    assert page.texts["span"][0] == "top-1 on 360 held-out images, ± 0.5"
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["Model"] == "biformer_atto"
    assert facts["Data"] == "digits, 32 × 32 pixels"
    assert re.fullmatch(r"\d\d January 2027, \d\d:\d\d", facts["Last step"])
    assert f"torch {torch.__version__}" in facts["Reported with"]
    assert facts["Command"].startswith("tessel train ") and facts["Command"].endswith("run.name=demo-again")


def test_the_sections_have_their_texts(page):
    assert "Waiting for data took 3% of the time" in page.sections["Training"]
    assert page.sections["Confusion"].startswith("3 of 360 held-out images are misclassified.")
    assert page.sections["Hardest images"].startswith("First the mistakes, as true → predicted class; then")


def test_the_command_prints_the_page_and_the_next_steps(run, undrawn, capsys):
    assert report.main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"report: {run}/report/index.html" in printed
    for command in ("tessel evaluate", "tessel train ", "tessel report"):
        assert command in printed
    assert "run.seed=4" in printed


@pytest.mark.parametrize(
    ("missing", "silent", "why"),
    [
        ("metrics.jsonl", {"Training"}, "no training step is logged yet"),
        ("evaluation", {"Confusion", "Hardest images"}, "tessel evaluate"),
        ("DONE", {"What the mixers attended to", "Use this model"}, "not finished"),
        ("export", {"What the mixers attended to"}, "export"),
        ("export/model.safetensors", {"What the mixers attended to"}, "export"),
    ],
)
def test_missing_pieces_are_left_out_with_a_sentence(run, undrawn, missing, silent, why):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert report.main([str(run)]) == 0
    page = Page(run / "report/index.html")
    assert page.texts["h2"] == list(SECTIONS)
    left_out = {name: text for name, text in page.sections.items() if text.startswith("Left out: ")}
    assert set(left_out) == silent
    assert all(why in text for text in left_out.values())
    assert page.texts.get("i") == [name for title in SECTIONS if title not in silent for name in SECTIONS[title]]


def change(file, **keys):
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_an_evaluation_with_overrides_is_not_reported(run, undrawn):
    change(run / "evaluation/evaluation.json", overrides=["data.size=96"], step=10)
    assert report.main([str(run)]) == 0
    page = Page(run / "report/index.html")
    assert page.texts["b"][0] == "88.0 %" and page.texts["span"][0].startswith("top-1 on 360 held-out images, ± 1.7")
    assert "step 10" not in page.texts["span"][0]
    for title in ("Confusion", "Hardest images"):
        assert page.sections[title].startswith("Left out: the evaluation was made with data.size=96; tessel evaluate")
    (run / "DONE").unlink()
    assert read_run(run).result == read_run(run).evals[-1]


def test_an_evaluation_of_another_step_names_the_step(run, finished, undrawn, tmp_path):
    change(run / "evaluation/evaluation.json", overrides=[], step=10)
    assert report.main([str(run)]) == 0
    page = Page(run / "report/index.html")
    assert (page.texts["b"][0], page.texts["span"][0]) == ("99.2 %", "top-1 on 360 held-out images, ± 0.5, at step 10")
    assert page.sections["Confusion"].startswith("3 of 360 held-out images are misclassified, at step 10.")
    assert report.main([str(run), str(finished), "--out", str(tmp_path / "both")]) == 0
    assert {"99.2 %, at step 10", "99.2 %"} <= set(Page(tmp_path / "both/index.html").texts["td"])


@pytest.mark.parametrize("content", ["{}", "{", "[]", ""])
def test_a_damaged_export_is_left_out(run, undrawn, content):
    (run / "export/config.json").write_text(content)
    assert report.main([str(run)]) == 0
    assert (
        "export/config.json does not match" in Page(run / "report/index.html").sections["What the mixers attended to"]
    )


@pytest.mark.parametrize("name", ["target", "prediction", "probability"])
def test_predictions_without_an_array_are_left_out(run, undrawn, name):
    file = run / "evaluation/predictions.npz"
    arrays = dict(np.load(file))
    del arrays[name]
    np.savez(file, **arrays)
    assert report.main([str(run)]) == 0
    page = Page(run / "report/index.html")
    for title in ("Confusion", "Hardest images"):
        assert f"{file} lacks {name}; tessel evaluate" in page.sections[title]


def test_a_run_that_has_just_started(run):
    for name in ("metrics.jsonl", "DONE"):
        (run / name).unlink()
    for name in ("evaluation", "export"):
        shutil.rmtree(run / name)
    assert report.main([str(run)]) == 0
    page = Page(run / "report/index.html")
    assert set(page.sections) == set(SECTIONS) and "b" not in page.texts and not page.links


def test_an_incomplete_last_line_is_skipped(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert len(read_run(run).train) == STEPS // EVERY


def test_an_evaluation_of_other_data_shows_no_images(run, undrawn):
    file = run / "evaluation/predictions.npz"
    arrays = dict(np.load(file))
    np.savez(file, **{name: array[:100] for name, array in arrays.items()})
    assert report.main([str(run)]) == 0
    page = Page(run / "report/index.html")
    assert "made on other data" in page.sections["Hardest images"] and "Left out" not in page.sections["Confusion"]


def test_no_mistakes(run, undrawn):
    save_predictions(run, wrong=[])
    assert report.main([str(run)]) == 0
    page = Page(run / "report/index.html")
    assert page.sections["Confusion"] == "0 of 360 held-out images are misclassified."
    assert page.sections["Hardest images"].startswith("There are no mistakes;")


def test_more_mistakes_than_there_is_room_for(run, undrawn):
    save_predictions(run, wrong=list(range(0, 360, 9)))
    assert report.main([str(run)]) == 0
    text = Page(run / "report/index.html").sections["Hardest images"]
    assert text.startswith("The worst 24 of 40 mistakes, as true → predicted class.") and "correct images" not in text


def test_the_hardest_images_come_in_order(run, monkeypatch):
    save_predictions(run, wrong=[7, 200])
    monkeypatch.setattr(classify, "hardest_card", lambda *card: card)
    monkeypatch.setattr(classify, "gallery", lambda cards, least: cards)
    data, cards = load_digits("val"), classify.hardest(read_run(run))[1]
    assert [(true, predicted) for _, true, predicted, _ in cards[:2]] == [
        (str(data.targets[i]), str((data.targets[i] + 1) % 10)) for i in (7, 200)
    ]
    # in the fixture the probability of the correct class falls with the index
    assert [image.tobytes() for image, *_ in cards[2:]] == [data[i][0].tobytes() for i in range(359, 337, -1)]
    assert cards[2][3] == pytest.approx(0.82 - 0.359)


def test_a_card_names_the_classes_as_text():
    image = Image.new("RGB", (800, 40))
    wrong = classify.hardest_card(image, "<cat>", "dog", 0.5)
    assert '<b class="error">&lt;cat&gt; → dog</b><br>50 %' in wrong and image.size == (800, 40)
    assert "<b>dog</b><br>99 %" in classify.hardest_card(image, "dog", "dog", 0.99)


def test_several_runs_are_compared(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "<other> & more")
    (other / "metrics.jsonl").unlink()
    out = tmp_path / "compared"
    assert report.main([str(finished), str(other), "--out", str(out)]) == 0
    page = Page(out / "index.html")
    assert page.texts["h1"] == ["2 runs compared"]
    assert {"demo", "<other> & more", "biformer_atto", "99.2 %"} <= set(page.texts["td"])
    drawn = {path.stem for path in out.glob("*.png") if "dark" not in path.name}
    assert drawn == set(SECTIONS["Training"])
    runs = [read_run(path) for path in (finished, finished)]
    (loss,), (accuracy,) = curves.draw_loss(runs).axes, curves.draw_metric(runs).axes
    assert len([line for line in loss.lines if len(line.get_xdata())]) == 4
    np.testing.assert_array_equal(accuracy.lines[1].get_ydata(), [82.5, 85.0, 87.5, 90.0])


def run_code(html, folder, monkeypatch):
    """Execute the code block with an image in the working directory."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / "image.jpg")
    monkeypatch.chdir(folder)
    exec(unescape(html.removeprefix("<pre>").removesuffix("</pre>")), {})


def test_the_code_classifies_an_image(finished, tmp_path, monkeypatch, capsys):
    run_code(report.usage(read_run(finished))[1], tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(re.fullmatch(r"\d+\.\d% \d", line) for line in lines)


@pytest.mark.parametrize("kind", trainer.SCENES)
def test_the_code_of_dense_tasks_runs(kind, tmp_path, monkeypatch):
    recipe = load_recipe(trainer.write_recipe(tmp_path / "tiny.yaml", **trainer.SCENES[kind]))
    task = task_spec(recipe).build(recipe, World())
    model = task.build_model()
    task.export(model, tmp_path / "export", model.state_dict())
    record = RunRecord(tmp_path, recipe, [], [], {"step": 1}, None, None)
    run_code(report.usage(record)[1], tmp_path, monkeypatch)


def test_masks_have_a_legend_of_the_classes_in_them(tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "MAX_PICTURES", 2)
    recipe = load_recipe(trainer.write_recipe(tmp_path / "tiny.yaml", **trainer.SCENES["segment"]))
    target, prediction = np.zeros((2, 3, 16, 16), np.uint8)
    target[0, :4], target[2], prediction[1, :4], prediction[1, 4:] = 3, 5, 7, 255
    kept = {"index": np.arange(3), "size": np.full((3, 2), 16), "target": target, "prediction": prediction}
    html = dense.predictions(RunRecord(tmp_path, recipe, [], [], None, {"miou": 1.0}, kept))[1]
    palette = task_spec(recipe).build(recipe, World()).palette
    shown = re.findall(r"rgb\(([\d,]+)\)[^>]*></i>([^<]+)</span>", html)
    # the third picture is not drawn, and 255 is no class
    assert [name for _, name in shown] == ["background", "2", "6"]
    assert [list(map(int, color.split(","))) for color, _ in shown] == [palette[label] for label in (0, 3, 7)]


def test_the_command_in_a_new_process(run):
    """Everything the report needs is imported by itself, such as the models of the zoo."""
    command = [sys.executable, "-m", "tessel.train.report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Left out" not in (run / "report/index.html").read_text()


def overwrite(file, change):
    file.write_bytes(change(file.read_bytes()))


def flipped(data):
    """The data with one bit flipped in the middle."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), "is not a run directory: it has no recipe.yaml"),
        (lambda run: (run / "metrics.jsonl").write_text("nonsense\n"), "cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text("\n[1]\n"), "line 1"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n'),
            "line 1: it lacks data_wait",
        ),
        (lambda run: (run / "evaluation/predictions.npz").write_text("nonsense"), "cannot be read"),
        (lambda run: (run / "evaluation/predictions.npz").write_text(""), "evaluation cannot be read"),
        (lambda run: overwrite(run / "evaluation/predictions.npz", lambda data: data[:2000]), "writes it again"),
        (lambda run: overwrite(run / "evaluation/predictions.npz", flipped), "writes it again"),
        (lambda run: (run / "evaluation/evaluation.json").write_text('{"step": 1}'), "it lacks count, top1"),
        (lambda run: (run / "DONE").write_text(""), "DONE cannot be read"),
        (lambda run: (run / "DONE").write_text("[]"), "DONE cannot be read"),
        (lambda run: (run / "report").rename(run / "old") and (run / "report").touch(), "cannot be written"),
    ],
)
def test_errors_are_one_line(run, damage, message, capsys):
    damage(run)
    assert report.main([str(run)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    assert str(run) in printed.err and message in printed.err


def test_several_runs_need_a_folder(finished, capsys):
    assert report.main([str(finished), str(finished)]) == 1
    assert "--out DIR" in capsys.readouterr().err


def test_a_failure_keeps_the_old_report(run, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}

    def full_disk(figure, path, **settings):
        path.write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    assert report.main([str(run)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == before


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (112, "1 min 52 s"), (3725, "1 h 2 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_focus_is_on_the_subject_and_on_the_background():
    picture = torch.zeros(40, 60, 3)
    picture[20:30, 5:20] = 1
    assert attention_maps.focus_pixels(picture) == ((25, 7), (5, 7))
    assert attention_maps.focus_pixels(1 - picture) == ((25, 7), (5, 7)), "dark on light as well"
