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
    # no models for tests that need the network, nor for those that timm parametrizes by other name patterns
    if pretrained or (filter and "deit*" not in filter) or (args and args[0]):
        return []
    names = os.environ["TESSEL_YARDSTICK"].split(",")
    assert set(names) <= set(tessel.zoo.list_models())
    return [full for name in names for full in (get_arch_pretrained_cfgs(name) or [name])] if include_tags else names


def pytest_configure(config):
    timm.list_models = _list_models


def is_wanted(item) -> bool:
    """Whether `item` is a core test; timm checks the shapes of models with a class token in a test of their own."""
    if not item.originalname.startswith("test_model_default_cfgs"):
        return item.originalname in CORE_TESTS
    name = item.callspec.params["model_name"].partition(".")[0]
    pools_token = any(
        name in family.variants and family.global_pool == "token" for family in tessel.zoo.list_families()
    )
    return item.originalname == "test_model_default_cfgs" + "_non_std" * pools_token


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if is_wanted(item)]
