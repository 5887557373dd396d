"""`custom_imports = dict(imports=["tessel.train.mmseg"])` registers `TesselBackbone`; see docs/openmmlab.md.

The short name is public and stays; the code is in `openmmlab/mmseg_backbone.py`.
"""

from .openmmlab.mmseg_backbone import TesselBackbone

__all__ = ["TesselBackbone"]
