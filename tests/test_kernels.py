"""Public names of every operator and the choice of a backend; runs the tests of the Triton kernels in new processes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tessel.kernels
from tessel.kernels import dispatch, verdicts
from tessel.kernels.dispatch import choose_backend
from tessel.kernels.verdicts import Judgment
from tessel.kernels.workload import Workload

HERE = Path(__file__).parent
OPERATORS = sorted(p.parent.name for p in (HERE.parent / "kernels").glob("*/functional.py"))


@pytest.mark.parametrize("name", OPERATORS)
def test_public_names_of_every_operator(name):
    module = importlib.import_module(f"tessel.kernels.{name}")
    for public in (f"{name}_attention", f"{name}_attention_reference", f"{name}_attention_unsupported"):
        assert getattr(tessel.kernels, public) is getattr(module, public)
        assert getattr(module, public).__doc__
    assert module.CASES


WORK = Workload(head_dim=32, keys=49, queries=1000, dtype=torch.bfloat16, training=True)


@pytest.fixture(autouse=True)
def no_verdict(monkeypatch):
    monkeypatch.setattr(verdicts, "load", lambda device: {})


def test_choose_backend():
    assert choose_backend("op", "auto", [], WORK) == "auto", "auto takes only kernels that were measured"
    assert choose_backend("op", "triton", [], WORK) == "triton"
    assert choose_backend("op", "reference", ["no GPU"], WORK) == "reference"
    with pytest.raises(ValueError, match="op.*'cuda'.*auto, triton, reference"):
        choose_backend("op", "cuda", [], WORK)
    with pytest.raises(RuntimeError, match="op.*no GPU; float64"):
        choose_backend("op", "triton", ["no GPU", "float64"], WORK)


def test_auto_follows_the_verdict(monkeypatch):
    judgment = Judgment("op", "d32-k64-q32768", "bfloat16", "forward+backward", "triton", "plain", True, "", {})
    monkeypatch.setattr(verdicts, "load", lambda device: {judgment.key: judgment})
    assert choose_backend("op_attention", "auto", [], WORK) == "triton"
    assert choose_backend("op_attention", "auto", ["no GPU"], WORK) == "auto"
    assert choose_backend("other_attention", "auto", [], WORK) == "auto"
    for other in (
        WORK._replace(training=False),
        WORK._replace(dtype=torch.float16),
        WORK._replace(keys=65),
        WORK._replace(queries=(1 << 15) + 1),
    ):
        assert choose_backend("op_attention", "auto", [], other) == "auto", other
    monkeypatch.setattr(verdicts, "enabled", False)
    assert choose_backend("op_attention", "auto", [], WORK) == "auto"


def test_kernels_that_failed_a_check_are_never_taken(monkeypatch):
    judgment = Judgment("op", "d32-k64-q32768", "bfloat16", "forward+backward", "triton", "triton", False, "", {})
    monkeypatch.setattr(verdicts, "load", lambda device: {judgment.key: judgment})
    assert choose_backend("op_attention", "auto", [], WORK) == "auto"


def test_default_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "default_backend", "reference")
    assert choose_backend("op", None, [], WORK) == "reference"
    assert choose_backend("op", "triton", [], WORK) == "triton"


def in_a_new_process(*command: str, interpret: bool) -> str:
    """Run Python in a new process, because Triton chooses interpreter or compiler at import."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=HERE, env=environment)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    return run.stdout


SLOW = {"interpreted_compile.py", "interpreted_models.py"}  # whole models, about a minute each


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(path.name, marks=[pytest.mark.slow] * (path.name in SLOW))
        for path in sorted(HERE.glob("interpreted_*.py"))
    ],
)
def test_triton_kernels_in_the_interpreter(file):
    pytest.importorskip("triton")
    assert " passed" in in_a_new_process("-m", "pytest", "-q", "-x", file, interpret=True)


@pytest.mark.slow
def test_compiled_kernels_stay_within_the_documented_resources():
    pytest.importorskip("triton")
    script = HERE.parent / "benchmarks" / "kernel_resources.py"
    assert "kernels within docs/kernels.md" in in_a_new_process(str(script), interpret=False)
