"""Which implementation of the attention operators a run takes: `parallel.kernels`."""

import os
from collections.abc import Callable

from ...kernels import dispatch, verdicts
from ..errors import UserError
from ..recipe.schema import Parallel
from .world import World


def use_kernels(parallel: Parallel, world: World, say: Callable[[str], None]) -> None:
    """Let attention run as `parallel.kernels` says; the environment variable TESSEL_KERNELS has precedence.

    `verify` judges the kernels first, one process of each node, if there is no verdict on its GPU.
    """
    if "TESSEL_KERNELS" in os.environ:
        return
    dispatch.use_backend("auto" if parallel.kernels == "verify" else parallel.kernels)
    if parallel.kernels != "verify" or world.device.type != "cuda":
        return
    with world.raise_on_all_ranks():
        if world.rank % world.local_size == 0 and verdicts.find("cuda") is None:
            say(f"judging the Triton kernels on this GPU, as `{verdicts.VERIFY} --quick` does; about two minutes")
            from ...kernels.__main__ import verify

            if verify("quick"):
                raise UserError("parallel.kernels=verify: the kernels could not be judged; use auto")
    verdicts.load.cache_clear()
