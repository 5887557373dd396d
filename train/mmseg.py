"""`custom_imports = dict(imports=["tessel.train.mmseg"])` registers `TesselBackbone`; see docs/openmmlab.md.

The short name is public and stays; the code is in `openmmlab/mmseg_backbone.py`.
"""

from .openmmlab.compat import import_yapf

import_yapf()

from .openmmlab.mmseg_backbone import TesselBackbone  # noqa: E402  (imports mmengine, which imports yapf)

__all__ = ["TesselBackbone"]
