"""Probing: training a classifier on the features of a frozen model."""

import math
from typing import Any

import timm
from timm.layers import AttentionPoolLatent
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn


def freeze_for_probe(model: Any, kind: str) -> nn.Module:
    """`model` frozen except for its classifier ("linear"), or for a new one with attention pooling ("attentive")."""
    if kind == "attentive":
        classes, body = model.num_classes, model
        body.reset_classifier(0)
        options = getattr(body, "_model_args", {})
        known = {key: value for key, value in options.items() if key not in ("num_classes", "in_chans")}
        architecture = body.pretrained_cfg["architecture"]
        model = timm.create_model(
            "attentive_probe",
            backbone=architecture,
            backbone_args=known,
            num_classes=classes,
            cfg=body.pretrained_cfg,
            **({"in_chans": options["in_chans"]} if "in_chans" in options else {}),
        )
        model._model_args.pop("cfg")  # an export brings its own configuration
        model.backbone.load_state_dict(body.state_dict())
    classifier = model.get_classifier()
    heads = (
        classifier if isinstance(classifier, tuple) else (classifier,)
    )  # some models have a second one for distillation
    trained = {parameter for head in heads for parameter in head.parameters()}
    trained |= set(model.pool.parameters()) if kind == "attentive" else set()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    return model


class AttentiveProbe(nn.Module):
    """Logits of a learned query's cross-attention over the last feature map of `backbone`.

    The pooling is timm's `AttentionPoolLatent`: attention of one latent token, a projection and an MLP.
    """

    def __init__(self, *, backbone: str, backbone_args: dict[str, Any], num_classes: int, in_chans: int = 3):
        super().__init__()
        self.backbone: Any = timm.create_model(backbone, num_classes=0, in_chans=in_chans, **backbone_args)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.backbone.num_features
        heads = math.gcd(self.num_features, 8)
        self.pool = AttentionPoolLatent(self.num_features, num_heads=heads, norm_layer=nn.LayerNorm)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, num_classes]"""
        x = self.backbone.forward_features(x)
        if x.ndim == 4:  # to tokens: [B, tokens, channels]
            last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            x = x.flatten(1, 2) if last else x.flatten(2).transpose(1, 2)
        return self.fc(self.pool(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing to do: a frozen backbone keeps no activations."""


@register_model
def attentive_probe(pretrained: bool = False, cfg: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """An `AttentiveProbe`; `cfg` is the configuration of its backbone's input, where no export brings one."""
    if cfg is not None:
        own = {"classifier": "fc", "architecture": "attentive_probe", "url": ""}
        # a fixed size is for the backbone, whose arguments have it
        kwargs["pretrained_cfg"] = {**cfg, **own, "fixed_input_size": False}
    return build_model_with_cfg(AttentiveProbe, "attentive_probe", pretrained, **kwargs)
