"""Run timm's own model tests, taken from its source distribution, on all models of this package."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
from timm_yardstick import CORE_TESTS

import tessel.zoo


def distinct_variants(variants: Mapping[str, Any]) -> tuple[str, ...]:
    """The first name of every configuration. A fine-tuned variant may have the configuration of its base model."""
    first = {}
    for name, row in variants.items():
        first.setdefault(row, name)
    return tuple(first.values())


FAMILIES = [distinct_variants(family.variants) for family in tessel.zoo.list_families()]
ATTO = tuple(name for names in FAMILIES for name in names if name.endswith("_atto"))


@pytest.fixture(scope="session")
def model_tests() -> Path:
    """`tests/test_models.py` of the installed timm. Skips the test if its source distribution cannot be downloaded."""
    home = Path(tempfile.gettempdir()) / f"timm-{timm.__version__}-tests"
    file = home / f"timm-{timm.__version__}" / "tests" / "test_models.py"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=home.parent) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            run = subprocess.run([*pip, "--dest", folder, f"timm=={timm.__version__}"], capture_output=True, text=True)
            if run.returncode:
                pytest.skip(f"no source distribution of timm {timm.__version__}: {run.stderr.strip()[-200:]}")
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(Path(folder) / "source", filter="data")
            with suppress(OSError):  # another pytest process has created the folder first
                (Path(folder) / "source").rename(home)
    return file


def count_passed(models: tuple[str, ...], file: Path) -> int:
    """Run timm's core tests on `models`, assert that none fails, and return the number of tests that passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timm_yardstick", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--rootdir", str(file.parent), "-c", os.devnull, str(file)]
    here = Path(__file__).parent
    environment = {**os.environ, "TESSEL_YARDSTICK": ",".join(models), "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    return int(re.findall(r"(\d+) passed", run.stdout)[-1])


def test_small_models_pass_timms_tests(model_tests):
    assert count_passed(ATTO, model_tests) == len(CORE_TESTS) * len(ATTO)


def first_published():
    """CI runs the first model of some families, of different layouts; `pytest -m large` runs those of the others."""
    in_ci = ("biformer", "cswin", "tessel_davit", "transnext", "nat", "van", "uniformer", "flowformer")
    for names in FAMILIES:
        family = names[0].removesuffix("_atto")
        yield pytest.param(names, id=family, marks=pytest.mark.slow if family in in_ci else pytest.mark.large)


@pytest.mark.parametrize("models", list(first_published()))
def test_first_published_models_pass_timms_tests(models, model_tests):
    assert count_passed(models[1:2], model_tests) >= len(CORE_TESTS)


@pytest.mark.large
@pytest.mark.parametrize("models", FAMILIES, ids=lambda names: names[0].removesuffix("_atto"))
def test_other_models_pass_timms_tests(models, model_tests):
    """Run these by hand: the models differ from the first of their family only in width, depth and image size."""
    assert count_passed(models[2:], model_tests) >= len(CORE_TESTS) * len(models[2:])
