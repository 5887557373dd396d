"""A signal sets a flag; sent to one of two processes during an evaluation it stops both, and the run can resume."""

import json
import os
import signal

import pytest
import trainer

from tessel.train.run.checkpoint import find_damage
from tessel.train.run.signals import Signals

SLOW = pytest.mark.slow
DIGITS = {"model": {"name": "test_resnet", "drop_path_rate": None}, "data": {"source": "digits", "eval_batch": 32}}


@pytest.mark.parametrize("task", ["classify", pytest.param("segment", marks=SLOW), pytest.param("detect", marks=SLOW)])
def test_signal_during_an_evaluation(tmp_path, task):
    sections = trainer.SCENES.get(task, DIGITS)
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", **sections, sched={"steps": 6})
    runs = tmp_path / "runs"
    places = {"usr1": "@1:3:SIGUSR1:evaluation", "term": "@0:3:SIGTERM:evaluation", "last": "@1:6:SIGTERM:finish"}
    first = [[place, recipe, f"run.name={name}"] for name, place in places.items()]
    done = trainer.run_processes(2, [recipe, "run.name=straight"], *first)
    assert trainer.exit_codes(done) == [[0, 0]] * 4 and not done.stderr, done.stderr
    for name, step in (("usr1", 3), ("term", 3), ("last", 6)):
        assert json.loads((runs / name / "PREEMPTED").read_text()) == {"step": step}
        assert not find_damage(runs / f"{name}/checkpoints/step-{step:08d}") and not (runs / name / "DONE").exists()
        evaluated = [record["step"] for record in trainer.metrics(runs / name) if record["kind"] == "eval"]
        assert evaluated == ([3, 6] if name == "last" else [])

    done = trainer.run_processes(2, *([recipe, f"run.name={name}"] for name in places))
    assert trainer.exit_codes(done) == [[0, 0]] * 3 and done.stdout.count("(exact)") == 3, done.stderr
    for name in places:
        assert (runs / name / "DONE").exists() and not (runs / name / "PREEMPTED").exists()
        assert trainer.stable_metrics(runs / name) == trainer.stable_metrics(runs / "straight"), name
        paths = (runs / f"{run}/checkpoints/step-00000006" for run in (name, "straight"))
        trainer.assert_same_checkpoint(*paths)


def test_signals_set_a_flag_and_a_second_sigint_interrupts():
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with Signals().caught() as signals:
            assert not signals.raised
            os.kill(os.getpid(), number)
            assert signals.raised
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
