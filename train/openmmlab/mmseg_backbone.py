"""`TesselBackbone`: any model of timm or tessel as the backbone of an OpenMMLab config, under MMEngine's own Runner.

    custom_imports = dict(imports=["tessel.train.mmseg"])           # in the config
    model = dict(backbone=dict(type="TesselBackbone", name="cswin_tiny", drop_path_rate=0.3), ...)

Importing this module registers `TesselBackbone` in mmengine's root registry, from which the registries of all OpenMMLab
packages inherit, and patches mmengine for current torch (see compat.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
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
    """`DenseBackbone` with OpenMMLab's interface: image `[B, 3, H, W]` to a list of feature maps `[B, C, h, w]`.

    A checkpoint of a published segmenter or detector loads into the model around this backbone (`load_from`, or
    mmsegmentation's test.py) like one trained here: published backbone keys are translated while they load.
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
        """name, options: of any model, and its arguments, as for `timm.create_model` (pretrained, drop_path_rate, ...).

        checkpoint, or `init_cfg=dict(type="Pretrained", checkpoint=...)`: a file or URL with initial weights, of a
        classifier, segmenter or detector, published or trained here. out_indices: stages whose maps are returned.
        norms, batch_norm: see `DenseBackbone`. with_cp: activation checkpointing. Raises UserError for another
        `init_cfg`.
        """
        super().__init__(name, out_indices=out_indices, norms=norms, batch_norm=batch_norm, **options)
        if init_cfg is not None:
            if (
                checkpoint is not None
                or init_cfg.get("type") != "Pretrained"
                or init_cfg.keys() - {"type", "checkpoint"}
            ):
                raise UserError(
                    f"TesselBackbone: init_cfg={dict(init_cfg)} must be dict(type='Pretrained', checkpoint=FILE), and "
                    "be left out if checkpoint=FILE is given; without a checkpoint the model initializes itself"
                )
            checkpoint = init_cfg["checkpoint"]
        self.checkpoint = checkpoint
        self.set_grad_checkpointing(with_cp)
        self.register_load_state_dict_pre_hook(_translate)

    def init_weights(self) -> None:
        """Load the checkpoint, if one is given. MMEngine's Runner calls this before training."""
        if self.checkpoint is not None:
            self.start_from_file(self.checkpoint)

    def start_from_file(self, file: str) -> None:
        """Load the backbone's weights from a file or URL. Raises ValueError for missing, unknown or misshapen ones."""
        with allow_history_buffers():
            state = read_state(fetch(file))
        # a detector of this trainer holds the backbone inside its feature pyramid
        prefix = "backbone.body." if any(key.startswith("backbone.fpn.") for key in state) else "backbone."
        own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        if any(key.startswith("body.") for key in own):
            try:
                self.load_state_dict(own)
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
    """Hook before load_state_dict: replace a published backbone's keys below `prefix` by tessel's."""
    keys = [key for key in state if key.startswith(prefix)]
    if not keys or not is_ours(module.name) or any(key.startswith(f"{prefix}body.") for key in keys):
        return
    module.load_published({f"backbone.{key.removeprefix(prefix)}": state.pop(key) for key in keys})
    state |= {prefix + key: tensor for key, tensor in module.state_dict().items()}
