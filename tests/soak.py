"""Kill and fuzz the trainer for as long as told: `python tests/soak.py MINUTES [SEED]`, or `make soak MINUTES=60`.

Each round prints its seed; a round that fails ends the program, and its seed repeats it.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trainer
from test_train_fuzz import fuzz_recipes
from test_train_hostile import fuzz_metadata

KILLS = 4  # in a round


def main() -> None:
    minutes, first = (
        float(sys.argv[1]),
        int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6),
    )
    end = time.monotonic() + 60 * minutes
    for seed in itertools.count(first):
        print(f"round with seed {seed}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            fuzz_recipes(100, seed)
            fuzz_metadata(Path(folder) / "step", 200, seed)
            kill_two_processes(Path(folder), seed, ("ddp", "fsdp")[seed % 2])
        if time.monotonic() > end:
            return


def kill_two_processes(folder: Path, seed: int, strategy: str) -> None:
    """Kill a run on two processes several times; what remains is good, and it ends like one that was not killed."""
    recipe = trainer.write_recipe(
        folder / "tiny.yaml",
        model={"name": "test_resnet", "drop_path_rate": None},
        data={"source": "digits", "micro_batch": 4},
        parallel={"strategy": strategy},
    )
    done = trainer.run_processes(2, [recipe, "run.name=straight"])
    assert trainer.exit_codes(done) == [[0, 0]], done.stderr
    script = str(Path(__file__).with_name("killing.py"))
    done = subprocess.run(
        [sys.executable, script, str(KILLS), str(recipe), "ckpt.every=1"],
        env=os.environ | {"KILLING_SEED": str(seed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["codes"] == [0, 0], done.stdout + done.stderr
    paths = (folder / f"runs/{name}/checkpoints/step-00000009" for name in ("straight", "tiny"))
    trainer.assert_same_checkpoint(*paths)
    print(f"seed {seed}: {KILLS} kills of two processes ({strategy}), the end is bitwise that of an uninterrupted run")


if __name__ == "__main__":
    main()
