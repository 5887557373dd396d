"""`import tessel.train.transfer` registers the timm model `attentive_probe`, which exported attentive probes need."""

from .tasks.classify.probe import attentive_probe

__all__ = ["attentive_probe"]
