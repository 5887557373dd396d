"""The pages "your own pictures" work as they stand: their commands run from the first to the last line."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, blocks

# what a reader waits for; one epoch is enough to see that a command works
SHORTER = ["run.device=cpu", "sched.epochs=1", "sched.warmup=0", "data.workers=0", "eval.every=null"]
EXPECTED = {
    "own_classify": ["check.html", "runs/pets/export/config.json", "runs/pets/report/index.html"],
    "own_segment": ["check.html", "runs/street/report/index.html", "predicted/000.png", "predicted/000_mask.png"],
    "own_detect": ["check.html", "runs/shelf/report/index.html", "predicted/000.png", "predicted/predictions.jsonl"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_commands_of_the_page_run(name, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (block,) = (block for block in blocks(ROOT / f"docs/{name}.md", "sh") if "own_data.py" in block)
    for line in block.splitlines():
        words = shlex.split(line)
        program = [sys.executable, "-m", "tessel"] if words[0] == "tessel" else [sys.executable]
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in words[1:]]
        extra = SHORTER if words[0] == "train" else []
        done = subprocess.run([*program, *words, *extra], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    for file in EXPECTED[name]:
        assert Path(tmp_path, file).stat().st_size, file
