"""Every script in examples/ runs by itself and prints what its docstring says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tessel

FOLDER = Path(tessel.__file__).parent / "examples"
PRINTED = {
    "detector.py": r"step 29: loss \d.*IoU 0\.[1-9]",
    "export_and_compare.py": r"cswin_atto: exported .* difference (\d\.\de-0[5-9]|0\.0e\+00).*images/s",
    "features.py": r"stage 3: stride 32, \[B, C, H, W\] = \[1, 96, 14, 20\]",
    "own_data.py": r"wrote own/digits, own/scenes and own/boxes",
    "own_folder.py": r"finished .* top1 (9\d|100)\..*0/000.png is predicted to be 0",
    "own_model.py": r"full attention .*HiLo .*bi-level routing .*strip attention .* parameters, accuracy",
}


def test_every_script_is_tested():
    assert set(PRINTED) == {path.name for path in FOLDER.glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_example(name, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::FutureWarning", str(FOLDER / name)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(PRINTED[name], run.stdout, re.DOTALL), run.stdout
