"""kill -9 at any instant costs the steps since the last checkpoint and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trainer

KILLS = 25


@pytest.mark.slow
def test_killed_at_random_instants_and_equal_at_the_end(tmp_path):
    recipe = trainer.write_recipe(
        tmp_path / "tiny.yaml",
        model={"name": "test_resnet", "drop_path": None},
        data={"source": "digits", "micro_batch": 4},
        sched={"steps": 24},
        ckpt={"every": 1},
        eval={"every": 24},
    )
    done = trainer.on_processes(2, [recipe, "run.name=straight", "ckpt.every=24"])
    assert trainer.exit_codes(done) == [[0, 0]], done.stderr
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), str(KILLS), str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(facts) == KILLS + 1 and facts[-1] == {"codes": [0, 0], "step": 24}
    assert sum(kill["partial"] for kill in facts[:-1]) >= 5  # inside the writing of a checkpoint
    steps = [kill["step"] for kill in facts]
    assert steps == sorted(steps) and {kill["victims"] for kill in facts[:-1]} == {1, 2}
    assert "not bitwise" not in done.stdout and "is broken" not in done.stdout
    runs = tmp_path / "runs"
    trainer.assert_same_checkpoint(*(runs / f"{name}/checkpoints/step-00000024" for name in ("straight", "tiny")))
    # metrics of a step say the same, whichever start wrote them
    assert trainer.learning(runs / "tiny") == trainer.learning(runs / "straight")
