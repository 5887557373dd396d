"""A pytest plugin that runs timm's own model tests on our models: `pytest -p timm_yardstick .../test_models.py`.

timm parametrizes its tests with calls of `timm.list_models`. This plugin replaces that function by one that returns the
models named in the environment variable `TESSEL_YARDSTICK`, separated by commas. It skips timm's TorchScript tests; see
docs/models.md.
"""

import os

import timm
from timm.models import get_arch_pretrained_cfgs

import tessel.zoo

CORE_TESTS = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
)


def _list_models(*args, include_tags: bool = False, pretrained: bool = False, filter="", **kwargs) -> list[str]:
    # no models for tests that need the network, nor for those that timm parametrizes by name patterns
    if pretrained or filter or (args and args[0]):
        return []
    names = os.environ["TESSEL_YARDSTICK"].split(",")
    assert set(names) <= set(tessel.zoo.list_models())
    return [full for name in names for full in (get_arch_pretrained_cfgs(name) or [name])] if include_tags else names


def pytest_configure(config):
    timm.list_models = _list_models


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if item.originalname in CORE_TESTS]
