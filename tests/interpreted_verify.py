"""The whole way from `verify` to the choice of a backend, in the CPU interpreter; run by test_kernels.py."""

import fake_clock
import pytest
import torch
from interpreter import poisoned_memory  # noqa: F401  (a fixture)

from tessel.kernels import __main__ as command
from tessel.kernels import verdicts, window_attention

WINDOWS = {"windows": ((2, 2),)}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder of verdicts of its own."""
    monkeypatch.setenv("TESSEL_HOME", str(tmp_path))
    verdicts.load.cache_clear()
    yield tmp_path
    verdicts.load.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """How often the Triton kernels of window attention ran forward."""
    from tessel.kernels.window import triton

    calls, forward = [], triton.forward
    monkeypatch.setattr(triton, "forward", lambda *args: calls.append(args) or forward(*args))
    return calls


def attend(dtype=torch.bfloat16, function=window_attention):
    # the class of the case `squares-windows`
    return function(torch.randn(2, 2, 2, 3, 1, 16, dtype=dtype), **WINDOWS)


def test_verdict_decides_what_auto_runs(home, launches, capsys):
    attend()
    assert not launches, "without a verdict plain PyTorch runs"
    # the kernels are faster than eager PyTorch, and slower than compiled
    assert command.verify("quick", "window", clock=f"{fake_clock.__name__}:clock") == 0
    printed = capsys.readouterr().out
    assert "3.00" in printed and "0.80" in printed and "triton; compiled: plain" in printed
    attend()
    assert len(launches) == 1
    attend(torch.float32)
    assert len(launches) == 1, "float32 was not judged"
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    attend(function=compiled)
    assert len(launches) == 1, "compiled PyTorch was faster"
    assert command.main(["verify", "--show"]) == 0 and command.main(["verify", "--forget"]) == 0
    verdicts.load.cache_clear()
    attend()
    assert len(launches) == 1
    assert command.main(["verify", "--show"]) == 1
