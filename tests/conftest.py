"""Shared by all tests: one thread, fixed seeds, and the parameter `model_name`."""

import hypothesis
import pytest
import torch

import tessel.zoo


def pytest_configure(config):
    torch.set_num_threads(1)
    # a slow machine fails no test
    hypothesis.settings.register_profile("tessel", deadline=None)
    hypothesis.settings.load_profile("tessel")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """`model_name`: the smallest model of every family, which has all of its mechanisms (test_timm.py tests all)."""
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", [n for n in tessel.zoo.list_models() if n.endswith("_atto")])
