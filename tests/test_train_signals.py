"""A signal in the middle of an evaluation, to one of two processes: all stop, what was learned is kept, none fails."""

import json

import trainer

from tessel.train.checkpoint import broken


def test_signal_within_an_evaluation(tmp_path):
    recipe = trainer.write_recipe(
        tmp_path / "tiny.yaml",
        model={"name": "test_resnet", "drop_path": None},
        data={"source": "digits", "micro_batch": 4, "eval_batch": 32},
        sched={"steps": 6},
    )
    runs = tmp_path / "runs"
    places = {"usr1": "@1:3:SIGUSR1:evaluation", "term": "@0:3:SIGTERM:evaluation", "last": "@1:6:SIGTERM:finish"}
    first = [[place, recipe, f"run.name={name}"] for name, place in places.items()]
    done = trainer.on_processes(2, [recipe, "run.name=straight"], *first)
    assert trainer.exit_codes(done) == [[0, 0]] * 4 and not done.stderr, done.stderr
    for name, step in (("usr1", 3), ("term", 3), ("last", 6)):
        assert json.loads((runs / name / "PREEMPTED").read_text()) == {"step": step}
        assert not broken(runs / f"{name}/checkpoints/step-{step:08d}") and not (runs / name / "DONE").exists()
        judged = [record["step"] for record in trainer.metrics(runs / name) if record["kind"] == "eval"]
        assert judged == ([3, 6] if name == "last" else [])

    done = trainer.on_processes(2, *([recipe, f"run.name={name}"] for name in places))
    assert trainer.exit_codes(done) == [[0, 0]] * 3 and done.stdout.count("(exact)") == 3, done.stderr
    for name in places:
        assert (runs / name / "DONE").exists() and not (runs / name / "PREEMPTED").exists()
        assert trainer.learning(runs / name) == trainer.learning(runs / "straight"), name
        paths = (runs / f"{run}/checkpoints/step-00000006" for run in (name, "straight"))
        trainer.assert_same_checkpoint(*paths)
