"""`custom_imports = dict(imports=["tessel.train.mmseg"])` registers `TesselBackbone`; see docs/openmmlab.md."""

from .openmmlab.mmseg_backbone import TesselBackbone

__all__ = ["TesselBackbone"]
