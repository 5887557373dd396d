"""OpenMMLab on current torch: the one place that stands in for what its packages lack.

mmcv's compiled operators do not build on current torch, and `mmcv-lite` ships without them; `mmseg` imports their
module all the same. `mmseg_modules()` puts a stand-in there and hands out `mmseg.models`. It has no operators:
what needs one says so when it is called.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from .schema import UserError

COMPILED = "mmcv._ext"


class _NoOperators(ModuleType):
    """A module in which every operator can be looked up, and none can be called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise UserError(
                f"mmcv's compiled operator {name} is not there: it does not build on current torch. Take a decode head "
                "that does without, such as UPerHead, FPNHead or SegformerHead"
            )

        return missing


def stand_in() -> None:
    """Put the stand-in where mmcv looks for its operators, unless a full mmcv has them."""
    if COMPILED in sys.modules or importlib.util.find_spec("mmcv") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec(COMPILED) is not None:
            return
    module = _NoOperators(COMPILED)
    # a spec without a loader: mmengine takes this for the mmcv-lite that it is
    module.__spec__ = ModuleSpec(COMPILED, loader=None)
    sys.modules[COMPILED] = module


def mmseg_modules() -> ModuleType:
    """`mmseg.models`, whose heads and losses are registered by it. Raises UserError where mmsegmentation is missing."""
    stand_in()
    try:
        with warnings.catch_warnings():
            # deprecations inside packages that are no longer released
            warnings.simplefilter("ignore")
            return importlib.import_module("mmseg.models")
    except ImportError as error:
        raise UserError(
            f"segmentation takes its decode heads from mmsegmentation, which cannot be imported ({error}): "
            "pip install 'tessel[dense]'"
        ) from error


def build(config: Mapping[str, Any]) -> nn.Module:
    """The head, neck or loss that `config` describes in mmsegmentation's own words: its `type` and its arguments."""
    modules = mmseg_modules()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return modules.HEADS.build(dict(config))
