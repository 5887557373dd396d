"""`tessel compare`: what is measured, equal cost, going on after a stop, and the page."""

import json
import re

import pytest
import trainer

from tessel import compare as comparing
from tessel.cli import main
from tessel.compare import Subject, comparison, parse_subject
from tessel.compare.matching import cost, matched
from tessel.compare.measures import costs, field
from tessel.train.errors import UserError

LAB = "tessel_lab_atto"


def run(tmp_path, *arguments):
    options = ["--lab", LAB, "--size", "32", "--seconds", "0.01", "--batch", "2", "--out", str(tmp_path / "out")]
    return main(["compare", *options, *arguments])


def test_subjects_are_models_or_mixers():
    assert parse_subject("cswin_atto", LAB) == Subject("cswin_atto", "cswin_atto")
    assert parse_subject("hilo, halo(block=4)", LAB) == Subject(
        "hilo, halo(block=4)", LAB, {"mixers": "hilo, halo(block=4)"}
    )
    assert parse_subject("window", LAB).options == {"mixers": "window"}
    for text, words in (
        ("cswin_ato", "cswin_atto"),
        ("hilo(", "mixers 'hilo('"),
        ("helo | hilo | hilo | hilo", "'hilo'?"),
    ):
        with pytest.raises(UserError) as caught:
            parse_subject(text, LAB)
        assert words in str(caught.value)


def test_all_models_of_timm_exist():
    for name in comparing.PEERS:
        assert parse_subject(name, LAB).name == name


def test_costs_and_their_growth():
    full, convolution = (costs(parse_subject(text, LAB), 64) for text in ("full_attention", "large_kernel"))
    assert full["parameters"] == sum(p.numel() for p in parse_subject("full_attention", LAB).make().parameters())
    assert 1.05 < full["growth"] < 2 and convolution["growth"] == pytest.approx(1, abs=0.02)
    # a model of a fixed input size is made for the larger images
    assert costs(parse_subject("test_vit", LAB), 64)["growth"] > 0.9


def test_receptive_field_is_larger_with_attention_to_the_whole_map():
    subjects = [parse_subject(text, LAB) for text in ("window(window=1)", "full_attention")]
    near, far = (field(subject, 160)["receptive_field"] for subject in subjects)
    assert 0.1 < near < 0.3 and 0.8 < far <= 1


@pytest.mark.parametrize("by", [pytest.param("gmacs", marks=pytest.mark.slow), "parameters"])
def test_matched_models_have_the_cost_of_the_first_within_2_percent(by):
    target = cost(parse_subject("window", LAB), 64, by)
    subject = matched(parse_subject("aggregated", LAB), target, 64, by)
    assert cost(subject, 64, by) == pytest.approx(target, rel=0.02) and subject.options.keys() > {"mixers"}
    model = parse_subject("cswin_atto", LAB)
    assert matched(model, target, 64, by) is model
    with pytest.raises(UserError, match=f"no width and depth of 'window' has {by} within 2%"):
        matched(parse_subject("window", LAB), target / 1000, 64, by)


def test_a_comparison_writes_a_table_json_and_a_page_and_goes_on_after_a_stop(tmp_path, capsys, monkeypatch):
    assert run(tmp_path, "window", "test_resnet") == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("window", "test_resnet", "GMACs", "index.html: written"))
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["model"] for row in content["rows"]] == ["window", "test_resnet"]
    assert all(row["inference"] > 0 and row["training"] > 0 for row in content["rows"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "test_resnet" in page and "accuracy" not in page.split("<table>")[1].split("</tr>")[0]
    assert not re.search(r'(src|href|srcset)="(?!data:)', page), "the page needs no other file"

    def fail(*args, **kwargs):
        raise AssertionError("measured again")

    for name in ("costs", "field", "speeds"):
        monkeypatch.setattr(comparison, name, fail)
    assert run(tmp_path, "window", "test_resnet", "--json") == 0
    assert json.loads(capsys.readouterr().out) == content["rows"]
    (tmp_path / "out" / "comparison.json").write_text('{"format": 9}')
    assert run(tmp_path, "window") == 1 and "has format 9, not 1" in capsys.readouterr().err


def test_models_are_trained_with_every_seed(tmp_path, capsys):
    data = {"source": "folder", "root": str(trainer.draw_folder(tmp_path / "images"))}
    sections = {"data": data, "model": {"drop_path_rate": None}}
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", sched={"steps": 2, "warmup": 0}, **sections)
    arguments = ["window", "--train", str(recipe), "--seconds", "0"]
    assert run(tmp_path, *arguments, "--seeds", "2") == 0
    (row,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert len(row["accuracies"]) == 2 and row["accuracy"] == pytest.approx(sum(row["accuracies"]) / 2)
    runs = sorted(path.name for path in (tmp_path / "out" / "runs").iterdir())
    assert len(runs) == 2 and re.fullmatch(r"window-[0-9a-f]{8}-seed0", runs[0]) and runs[1].endswith("-seed1")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "2 seeds" in page and "accuracy of each seed" in page
    assert not row.keys() & {"inference", "training"} and "<th>images/s</th>" not in page

    trainer.write_recipe(tmp_path / "tiny.yaml", sched={"steps": 3, "warmup": 0}, **sections)
    assert run(tmp_path, *arguments) == 0, "an edited recipe is trained in a folder of its own"
    steps = [json.loads((path / "DONE").read_text())["step"] for path in (tmp_path / "out" / "runs").iterdir()]
    assert sorted(steps) == [2, 2, 3]


def test_models_that_refuse_a_size_are_named(capsys, tmp_path, monkeypatch):
    def refuse(subject, size):
        raise AssertionError("Input height (32) doesn't match")

    monkeypatch.setattr(comparison, "costs", refuse)
    assert run(tmp_path, "test_resnet") == 1
    assert "test_resnet with images of 32 x 32: " in capsys.readouterr().err
    assert main(["compare", "window", "--size", "a,b"]) == 2
    assert "'a,b' is no list of sides in pixels" in capsys.readouterr().err
