"""Verdict files of `python -m tessel.kernels verify`, and what rows of measurements make of them."""

import pytest
import torch

from tessel.kernels import __main__ as command
from tessel.kernels import dispatch, verdicts
from tessel.kernels.verdicts import Judgment
from tessel.train.distributed.attention_backend import use_kernels
from tessel.train.distributed.world import World
from tessel.train.recipe.schema import Parallel

FOUND = {"device": "Some GPU, sm_90", "driver": "13.0", "torch": "2.14.1", "triton": "3.7", "tessel": "0.2"}
JUDGMENT = Judgment(
    "window", "d32-k64-q32768", "bfloat16", "forward", "triton", "plain", True, "", {"a": {"eager": 2.0}}
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSEL_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "environment", lambda device: FOUND)
    verdicts.load.cache_clear()
    yield tmp_path / "kernels"
    verdicts.load.cache_clear()


def test_written_verdict_is_read_again(home, caplog):
    assert dict(verdicts.load("cuda")) == {}
    assert caplog.messages == [
        "attention runs in plain PyTorch; `python -m tessel.kernels verify` tries whether Triton kernels are faster"
    ]
    verdicts.load("cuda")
    assert len(caplog.messages) == 1, "it is said once"
    path = verdicts.write(FOUND, [JUDGMENT])
    assert path.parent == home and [file.name for file in home.iterdir()] == [path.name]
    assert dict(verdicts.load("cuda")) == {JUDGMENT.key: JUDGMENT}
    assert verdicts.fastest("cuda", *JUDGMENT.key, False) == "triton"
    assert verdicts.fastest("cuda", *JUDGMENT.key, True) == "plain"


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda text: text[:-20], "it cannot be read (JSONDecodeError"),
        (lambda text: "[]", "it cannot be read (TypeError"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "its format is 2, this version reads 1"),
        (
            lambda text: text.replace('"torch": "2.14.1"', '"torch": "2.11.0"'),
            "it was made with 2.11.0 instead of 2.14.1",
        ),
        (lambda text: text.replace('"fastest": "triton"', '"fastest": "magic"'), "it names an unknown implementation"),
        (lambda text: text.replace('"reason"', '"why"'), "it cannot be read (TypeError"),
    ],
    ids=["cut off", "a list", "a later format", "another torch", "an unknown implementation", "an unknown field"],
)
def test_unusable_verdict_is_ignored_with_a_reason(damage, reason, caplog):
    path = verdicts.write(FOUND, [JUDGMENT])
    path.write_text(damage(path.read_text()))
    assert dict(verdicts.load("cuda")) == {}
    assert f"the verdict in {path} is ignored: {reason}" in caplog.messages[0]


def test_packaged_verdict_counts_where_the_user_has_none(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "verdicts").mkdir(parents=True)
    monkeypatch.setattr(verdicts, "__file__", str(package / "verdicts.py"))
    mine = verdicts.write(FOUND, [JUDGMENT])
    mine.rename(package / "verdicts" / mine.name)
    assert list(verdicts.load("cuda")) == [JUDGMENT.key]
    other = Judgment(*JUDGMENT.key, "plain", "plain", True, "eager is faster", {})
    verdicts.write(FOUND, [other])
    assert verdicts.load("cuda")[JUDGMENT.key] == other


def row(case, implementation, median, **changes):
    known = {"operator": "window", "case": case, "shape_class": "d32-k64-q32768", "dtype": "bfloat16"}
    return known | {"direction": "forward", "implementation": implementation, "median_us": median} | changes


def judged(rows, checks=()):
    verify = pytest.importorskip("tessel.kernels.verification.verify")
    settings = verify.Settings(budget=1.0)
    return {one.key: one for one in verify.judge(dict(checks), rows, settings)}


def test_kernels_must_be_faster_in_every_case_of_a_class():
    rows = [row("a", "triton", 5.0), row("a", "eager", 9.0), row("a", "compiled", 6.0)]
    (one,) = judged(rows).values()
    assert (one.fastest, one.compiled, one.correct, one.reason) == ("triton", "triton", True, "")
    rows += [row("b", "triton", 5.0), row("b", "eager", 4.0), row("b", "compiled", 6.0)]
    (one,) = judged(rows).values()
    assert (one.fastest, one.compiled) == ("plain", "triton")
    assert one.reason == "b: eager PyTorch takes 4 us, the kernels 5 us"
    rows += [row("c", "triton", 5.0), row("c", "eager", 9.0)]
    assert next(iter(judged(rows).values())).compiled == "plain", "compiled PyTorch was not timed in one case"


def test_failed_check_condemns_its_class_and_no_other():
    case = "davit-small-stage1-224-windows"
    checks = {("window", case): [{"dtype": "bfloat16", "reasons": ["y: error 3e-2 is above 1e-2"]}]}
    found = judged([row("a", "triton", 5.0), row("a", "eager", 9.0)], checks)
    for direction in ("forward", "forward+backward"):
        large = found["window", "d32-k64-qmore", "bfloat16", direction]
        assert not large.correct and large.reason == f"{case}: y: error 3e-2 is above 1e-2"
    assert found["window", "d32-k64-q32768", "bfloat16", "forward"].correct and len(found) == 3


def test_commands_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["verify"]) == 1
    assert "error: this torch sees no GPU" in capsys.readouterr().err


def test_show_and_forget(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["verify", "--show"]) == 1
    assert "no verdict on Some GPU, sm_90" in capsys.readouterr().out
    path = verdicts.write(FOUND, [JUDGMENT])
    assert command.main(["verify", "--show"]) == 0
    printed = capsys.readouterr().out
    assert "d32-k64-q32768" in printed and "triton; compiled: plain" in printed and str(path) in printed
    assert command.main(["verify", "--forget"]) == 0 and not path.exists()
    assert command.main(["verify", "--forget"]) == 0
    assert "there is no verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kernels, device, backend, judged",
    [
        ("auto", "cuda", "auto", False),
        ("triton", "cuda", "triton", False),
        ("reference", "cpu", "reference", False),
        ("verify", "cpu", "auto", False),
        ("verify", "cuda", "auto", True),
    ],
)
def test_key_of_a_recipe(kernels, device, backend, judged, monkeypatch, capsys):
    calls = []
    monkeypatch.delenv("TESSEL_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "default_backend", "changed")
    monkeypatch.setattr(command, "verify", lambda extent: calls.append(extent) or 0)
    world = World(device=torch.device(device))
    use_kernels(Parallel(kernels=kernels), world, print)
    assert dispatch.default_backend == backend and calls == ["quick"] * judged
    assert ("judging the Triton kernels on this GPU" in capsys.readouterr().out) is judged
    verdicts.write(FOUND, [JUDGMENT])
    use_kernels(Parallel(kernels=kernels), world, print)
    assert len(calls) == judged, "a verdict is made once"


def test_environment_variable_has_precedence_over_the_recipe(monkeypatch):
    monkeypatch.setenv("TESSEL_KERNELS", "reference")
    monkeypatch.setattr(dispatch, "default_backend", "reference")
    use_kernels(Parallel(kernels="triton"), World(), print)
    assert dispatch.default_backend == "reference"
