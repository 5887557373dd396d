"""Backbones for those who train with mmsegmentation or another OpenMMLab package, under MMEngine's own Runner.

    custom_imports = dict(imports=["tessel.train.mmseg"])           # in the config
    model = dict(backbone=dict(type="TesselBackbone", name="cswin_tiny", drop_path_rate=0.3), ...)

The import registers `TesselBackbone` in mmengine's root registry, from which every OpenMMLab package inherits, and lets
these packages run on current torch (`train/openmmlab.py` says what that takes).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS  # noqa: E402  not before it is known to be there
from torch import Tensor

from ...checkpoints import fetch, read_state
from ...zoo import from_published
from ...zoo._family import is_ours
from ...zoo.dense import PREFIXES, BatchNorms, DenseBackbone
from ..errors import UserError
from .compat import allow_history_buffers, install_mmcv_stub, patch_runner

install_mmcv_stub()


patch_runner()


@MODELS.register_module()
class TesselBackbone(DenseBackbone):
    """`DenseBackbone` in OpenMMLab's words: image `[B, 3, H, W]` to a list of maps, for any head or neck.

    A checkpoint of a published segmenter or detector loads into the model around it (`load_from`, or mmsegmentation's
    test.py) as one of our own: the backbone's part is translated on the way.
    """

    def __init__(
        self,
        name: str,
        *,
        checkpoint: str | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norms: Sequence[bool] | None = None,
        batch_norm: BatchNorms = "train",
        with_cp: bool = False,
        **options: Any,
    ):
        """name: of any model of timm or tessel; options: of `timm.create_model`, as pretrained or drop_path_rate.

        checkpoint, or `init_cfg=dict(type="Pretrained", checkpoint=...)`: a file or an address to start from, of a
        classifier or of a segmenter or detector, published or ours. out_indices: the stages that hand out their map.
        norms, batch_norm: as in `DenseBackbone`. with_cp: recompute activations in the backward. Raises UserError for
        another init_cfg.
        """
        super().__init__(name, out_indices=out_indices, norms=norms, batch_norm=batch_norm, **options)
        if init_cfg is not None:
            if (
                checkpoint is not None
                or init_cfg.get("type") != "Pretrained"
                or init_cfg.keys() - {"type", "checkpoint"}
            ):
                raise UserError(
                    f"TesselBackbone: init_cfg={dict(init_cfg)} must be dict(type='Pretrained', checkpoint=FILE), or "
                    "be left out where checkpoint= is given: the models bring their own initialisation"
                )
            checkpoint = init_cfg["checkpoint"]
        self.checkpoint = checkpoint
        self.set_grad_checkpointing(with_cp)
        self.register_load_state_dict_pre_hook(_translate)

    def init_weights(self) -> None:
        """Called by the Runner before training: takes the checkpoint, if one is named."""
        if self.checkpoint is not None:
            self.start_from_file(self.checkpoint)

    def start_from_file(self, file: str) -> None:
        """Take the backbone's weights out of a file or an address. Raises ValueError for what is missing or unknown."""
        with allow_history_buffers():
            state = read_state(fetch(file))
        # in our detectors it lies within the feature pyramid
        place = "backbone.body." if any(key.startswith("backbone.fpn.") for key in state) else "backbone."
        ours = {key.removeprefix(place): t for key, t in state.items() if key.startswith(place)}
        if any(key.startswith("body.") for key in ours):
            try:
                self.load_state_dict(ours)
            except RuntimeError as error:
                raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
        elif any(key.startswith(PREFIXES) for key in state):
            self.load_published(state)
        elif is_ours(self.name) and self.body.state_dict().keys() - state.keys():
            counters = {k: t for k, t in self.body.state_dict().items() if not t.is_floating_point()}
            self.load_classifier(counters | from_published(self.name, state, **self.options))
        else:
            self.load_classifier(state)


def _translate(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: a published backbone's keys below `prefix` become ours."""
    keys = [key for key in state if key.startswith(prefix)]
    if not keys or not is_ours(module.name) or any(key.startswith(f"{prefix}body.") for key in keys):
        return
    module.load_published({f"backbone.{key.removeprefix(prefix)}": state.pop(key) for key in keys})
    state |= {prefix + key: tensor for key, tensor in module.state_dict().items()}
