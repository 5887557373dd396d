"""Public names of every operator and the choice of a backend; runs the tests of the Triton kernels in new processes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tessel.kernels
from tessel.kernels import dispatch
from tessel.kernels.dispatch import choose_backend

HERE = Path(__file__).parent
OPERATORS = sorted(p.parent.name for p in (HERE.parent / "kernels").glob("*/functional.py"))


@pytest.mark.parametrize("name", OPERATORS)
def test_public_names_of_every_operator(name):
    module = importlib.import_module(f"tessel.kernels.{name}")
    for public in (f"{name}_attention", f"{name}_attention_reference", f"{name}_attention_unsupported"):
        assert getattr(tessel.kernels, public) is getattr(module, public)
        assert getattr(module, public).__doc__
    assert module.CASES


def test_choose_backend():
    assert choose_backend("op", "auto", []) == "auto", "auto takes only kernels that were measured on a GPU"
    assert choose_backend("op", "triton", []) == "triton"
    assert choose_backend("op", "reference", ["no GPU"]) == "reference"
    with pytest.raises(ValueError, match="op.*'cuda'.*auto, triton, reference"):
        choose_backend("op", "cuda", [])
    with pytest.raises(RuntimeError, match="op.*no GPU; float64"):
        choose_backend("op", "triton", ["no GPU", "float64"])


def test_auto_uses_enabled_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "ENABLED_BY_DEFAULT", frozenset({"op"}))
    assert choose_backend("op", "auto", []) == "triton"
    assert choose_backend("op", "auto", ["no GPU"]) == "auto"
    assert choose_backend("other", "auto", []) == "auto"


def test_default_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "default_backend", "reference")
    assert choose_backend("op", None, []) == "reference"
    assert choose_backend("op", "triton", []) == "triton"


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
