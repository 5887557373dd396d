"""Compatibility of OpenMMLab's packages with current torch: all of tessel's patches to them are in this file.

mmcv's compiled operators do not build on current torch. `mmcv-lite` comes without them, but `mmseg` imports their
module nevertheless. `mmseg_modules()` installs a stub for that module and returns `mmseg.models`; an operator of the
stub raises a UserError when it is called. `patch_runner()` makes MMEngine's Runner work; only users of that Runner need
it, tessel's trainer does not.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import sys
import time
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

COMPILED_OPERATORS = "mmcv._ext"
YAPF_ATTEMPTS = 20


class _OperatorStub(ModuleType):
    """A module with every attribute; each is a function that raises a UserError."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise UserError(
                f"mmcv's compiled operator {name} is not available: it does not build on current torch. Use a decode "
                "head that does not need it, such as UPerHead, FPNHead or SegformerHead"
            )

        return missing


def install_mmcv_stub() -> None:
    """Install a stub for the module `mmcv._ext`, unless mmcv is missing or has its compiled operators."""
    if COMPILED_OPERATORS in sys.modules or importlib.util.find_spec("mmcv") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec(COMPILED_OPERATORS) is not None:
            return
    module = _OperatorStub(COMPILED_OPERATORS)
    # mmengine recognizes mmcv-lite by a spec of mmcv._ext without a loader
    module.__spec__ = ModuleSpec(COMPILED_OPERATORS, loader=None)
    sys.modules[COMPILED_OPERATORS] = module


def import_yapf() -> None:
    """Import yapf, which mmengine imports; do nothing if it is missing.

    Its first import in an environment writes a cache, of which another process may read a half; then it tries again.
    """
    for _ in range(YAPF_ATTEMPTS):
        try:
            with contextlib.suppress(ImportError):
                importlib.import_module("yapf")
            return
        except (EOFError, UnpicklingError):
            time.sleep(0.5)


def mmseg_modules() -> ModuleType:
    """Import `mmseg.models`, which registers its heads and losses. Raises UserError if mmsegmentation is missing."""
    install_mmcv_stub()
    import_yapf()
    try:
        with warnings.catch_warnings():
            # deprecation warnings of packages that are no longer maintained
            warnings.simplefilter("ignore")
            return importlib.import_module("mmseg.models")
    except ImportError as error:
        raise UserError(
            f"the decode heads for segmentation come from mmsegmentation, which cannot be imported ({error}): "
            "pip install 'tessel[dense]'"
        ) from error


def build(config: Mapping[str, Any]) -> nn.Module:
    """Build a head, neck or loss from an mmsegmentation config: its `type` and its arguments."""
    modules = mmseg_modules()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return modules.HEADS.build(dict(config))


def patch_runner() -> None:
    """Patch mmengine so that its Runner can resume on current torch and train on several processes without a GPU.

    1. Loading checkpoints. mmengine 0.10.7 calls torch.load with its default, which since torch 2.6 is
       `weights_only=True` and refuses the log history in mmengine's checkpoints. mmengine's loader of local files is
       replaced by `load_from_local`, which allows that history and nothing else. No pickled code runs.
    2. Process group. mmengine calls torch.cuda.set_device before it creates the group, which fails without a GPU.
       Without one, a gloo group is created instead.
    3. DistributedDataParallel. The Runner passes `device_ids`, which a model on the CPU does not accept. For such a
       model they are removed.

    A second call changes nothing. Raises UserError if mmengine is missing.
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
    _wrap(MMDistributedDataParallel, "__init__", _without_device_ids_on_cpu)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a checkpoint of mmengine with `weights_only=True`, allowing its log history: pickled code never runs.

    Raises UserError naming the first object in the file that is not allowed, FileNotFoundError for a missing file.
    """
    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{filename} is not a file")
    with allow_history_buffers():
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except UnpicklingError as error:
            # not torch's whole message: it explains how to run the code nevertheless
            found = re.search(r"GLOBAL (\S+)|(attribute '\w+' of \S+)", str(error))
            raise UserError(
                f"{filename} was not read: besides weights and mmengine's log history it contains "
                f"{(found[1] or found[2]) if found else 'an object that torch.load refuses'}, which can run code"
            ) from error


def allow_history_buffers() -> Any:
    """Context in which torch.load(weights_only=True) accepts mmengine's HistoryBuffer and numpy arrays and scalars.

    Files may be written with numpy 1 or 2, which pickle arrays under different module names: both are allowed.
    """
    from mmengine.logging import HistoryBuffer

    rebuild: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")
    dtypes = {type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)}
    allowed = {
        HistoryBuffer,
        (_statistics_method, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *dtypes,
        *((rebuild, f"{module}._reconstruct") for module in modules),
        *((scalar, f"{module}.scalar") for module in modules),
    }
    # at its end safe_globals removes all it was given: leave out what the user had allowed before
    return torch.serialization.safe_globals(list(allowed - set(torch.serialization.get_safe_globals())))


def _statistics_method(owner: Any, name: str) -> Callable[..., Any]:
    """Replaces `getattr` in unpickling: a HistoryBuffer pickles references to its statistics methods with it.

    Raises UnpicklingError for any other attribute.
    """
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in HistoryBuffer._statistics_methods:
        return HistoryBuffer._statistics_methods[name]
    raise UnpicklingError(f"attribute {name!r} of {getattr(owner, '__name__', type(owner).__name__)}")


def _wrap(owner: Any, name: str, decorator: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by its decorated version, once."""
    current = getattr(owner, name)
    if not hasattr(current, "patched_by_tessel"):
        patched = functools.wraps(current)(decorator(current))
        patched.patched_by_tessel = True  # type: ignore[attr-defined]
        setattr(owner, name, patched)


def _gloo_without_gpu(init_dist: Callable[..., Any]) -> Callable[..., Any]:
    def patched(backend: str, **options: Any) -> None:
        from mmengine.device import get_device

        if get_device() != "cpu":
            init_dist(backend, **options)
            return
        options.pop("init_backend", None)
        torch.distributed.init_process_group("gloo", **options)

    return patched


def _without_device_ids_on_cpu(init: Callable[..., Any]) -> Callable[..., Any]:
    def patched(self: Any, module: nn.Module, *args: Any, **options: Any) -> None:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            options["device_ids"] = None
        init(self, module, *args, **options)

    return patched
