"""Set up all tests: one thread, a fixed seed, and the parameter `model_name`."""

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import tessel.zoo

# `python -m pytest` puts the folder above on the path, whose `kernels` transformers takes for a package of that name
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parents[1]]


def pytest_configure(config):
    torch.set_num_threads(1)
    # no deadline, so that a slow machine fails no test
    hypothesis.settings.register_profile("tessel", deadline=None)
    hypothesis.settings.load_profile("tessel")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """Run tests with the argument `model_name` on the smallest model of every family; test_timm.py uses all models."""
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", [n for n in tessel.zoo.list_models() if n.endswith("_atto")])
