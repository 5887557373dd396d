"""mmsegmentation on current torch: its heads work, and a missing operator or package is named."""

import importlib
import sys

import pytest
import torch

from tessel.train.errors import UserError
from tessel.train.openmmlab import compat


@pytest.mark.parametrize("name", ["UPerHead", "SegformerHead", "FPNHead", "FCNHead"])
def test_heads_of_mmsegmentation(name):
    options = {"feature_strides": [4, 8]} if name == "FPNHead" else {}
    single_input = name == "FCNHead"
    head = compat.build(
        {
            "type": name,
            "in_channels": 4 if single_input else [4, 8],
            "in_index": 0 if single_input else [0, 1],
            "channels": 8,
            "num_classes": 3,
            "norm_cfg": {"type": "BN"},
            **options,
        }
    )
    assert head.eval()([torch.randn(1, 4, 16, 16), torch.randn(1, 8, 8, 8)]).shape == (1, 3, 16, 16)


def test_missing_operator_is_named():
    compat.mmseg_modules()
    from mmcv.ops import nms

    with pytest.raises(UserError, match="operator nms is not available.*UPerHead"):
        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmseg.models", None)
    with pytest.raises(UserError, match="tessel\\[dense\\]"):
        compat.mmseg_modules()


def test_a_half_written_cache_of_yapf_is_read_again(monkeypatch):
    """Another process is writing it, in its first import in a new environment."""
    found, errors = [], [EOFError("Ran out of input")]
    original = importlib.import_module

    def import_module(name):
        if name == "yapf" and errors:
            raise errors.pop()
        found.append(name)
        return original(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(compat.time, "sleep", lambda seconds: None)
    compat.import_yapf()
    assert found == ["yapf"] and not errors
