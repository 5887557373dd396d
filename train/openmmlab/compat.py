"""OpenMMLab on current torch: the one place that stands in for what its packages lack.

mmcv's compiled operators do not build on current torch, and `mmcv-lite` ships without them; `mmseg` imports their
module all the same. `mmseg_modules()` puts a stand-in there and hands out `mmseg.models`. It has no operators:
what needs one says so when it is called. `patch_runner()` is for those who train under MMEngine's own Runner; our
trainer does without.
"""

import functools
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UserError

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


def install_mmcv_stub() -> None:
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
    install_mmcv_stub()
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


def patch_runner() -> None:
    """Let MMEngine's Runner resume on current torch, and run on several processes without a GPU; for mmengine alone.

    1. Resume. mmengine 0.10.7 reads checkpoints with torch.load's default, which since torch 2.6 refuses the log
       history that it saves beside the weights. Its loader of local files lets these through, by name and for the
       length of that one call. No code of a file runs: the `getattr` by which the history is pickled finds the
       statistics of a history and nothing else.
    2. The process group. mmengine starts it after torch.cuda.set_device, which a machine without a GPU refuses. There
       the group is gloo's.
    3. DistributedDataParallel. The Runner names a GPU to it, which a model on the CPU refuses. There it names none.

    A second call changes nothing. Raises UserError where mmengine is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mmengine.dist import utils
            from mmengine.model import MMDistributedDataParallel
            from mmengine.runner.checkpoint import CheckpointLoader
    except ImportError as error:
        raise UserError(f"mmengine cannot be imported ({error}): pip install 'tessel[dense]'") from error
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    _wrap(utils, "_init_dist_pytorch", _gloo_without_gpu)
    _wrap(MMDistributedDataParallel, "__init__", _no_ids_on_cpu)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """A checkpoint of mmengine, read without running any code that it may hold.

    Raises UserError naming what it asks for where that is neither tensors nor mmengine's history.
    """
    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{filename} is no file")
    with allow_history_buffers():
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except UnpicklingError as error:
            # torch's message goes on to explain how to run the code after all
            asked = re.search(r"GLOBAL (\S+)|(attribute '\w+' of \S+)", str(error))
            raise UserError(
                f"{filename} was not read: beside weights and mmengine's history it asks for "
                f"{(asked[1] or asked[2]) if asked else 'what torch.load refuses'}, which can run code"
            ) from error


def allow_history_buffers() -> Any:
    """A context in which torch.load lets a HistoryBuffer through: its parts, by their names in numpy 1 and 2."""
    from mmengine.logging import HistoryBuffer

    rebuild: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")
    kinds = {type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)}
    parts = {
        HistoryBuffer,
        (_statistic, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *kinds,
        *((rebuild, f"{module}._reconstruct") for module in modules),
        *((scalar, f"{module}.scalar") for module in modules),
    }
    # at its end the context forgets what it was given: leave out what was let through before
    return torch.serialization.safe_globals(list(parts - set(torch.serialization.get_safe_globals())))


def _statistic(owner: Any, name: str) -> Callable[..., Any]:
    """The `getattr` of a saved HistoryBuffer, which pickles its methods by it."""
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in HistoryBuffer._statistics_methods:
        return HistoryBuffer._statistics_methods[name]
    raise UnpicklingError(f"attribute {name!r} of {getattr(owner, '__name__', type(owner).__name__)}")


def _wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    current = getattr(owner, name)
    if not hasattr(current, "mended"):
        mended = functools.wraps(current)(around(current))
        mended.mended = True  # type: ignore[attr-defined]
        setattr(owner, name, mended)


def _gloo_without_gpu(start: Callable[..., Any]) -> Callable[..., Any]:
    def started(backend: str, **options: Any) -> None:
        from mmengine.device import get_device

        if get_device() != "cpu":
            start(backend, **options)
            return
        options.pop("init_backend", None)
        torch.distributed.init_process_group("gloo", **options)

    return started


def _no_ids_on_cpu(construct: Callable[..., Any]) -> Callable[..., Any]:
    def constructed(self: Any, module: nn.Module, *args: Any, **options: Any) -> None:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            options["device_ids"] = None
        construct(self, module, *args, **options)

    return constructed
