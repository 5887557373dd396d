"""`import tessel.train.transfer` registers the timm models that exported attentive probes need."""

from .tasks.classify.probe import attentive_probe, attentive_probe_pooling

__all__ = ["attentive_probe", "attentive_probe_pooling"]
