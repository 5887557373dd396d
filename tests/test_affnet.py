"""AFFNet's `output_stride` for dense prediction."""

import pytest
import timm
import torch

import tessel.zoo  # noqa: F401  (registers the models)


@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations"),
    [(32, (4, 8, 16, 32), (1, 1, 1, 1)), (16, (4, 8, 16, 16), (1, 1, 1, 1)), (8, (4, 8, 8, 8), (1, 1, 1, 2))],
)
def test_output_stride_sets_strides_and_dilations(output_stride, strides, dilations):
    """A downsampling layer has the dilation of the stage before it."""
    model = timm.create_model("affnet_atto", output_stride=output_stride).eval()
    assert tuple(info["reduction"] for info in model.feature_info) == strides
    assert tuple(stage.down.conv_dw.dilation[0] for stage in model.stages) == dilations
    maps = model.forward_intermediates(torch.randn(1, 3, 61, 96), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-61 // s), -(-96 // s)) for s in strides]


def test_output_stride_does_not_change_the_weights():
    dense = timm.create_model("affnet_atto", output_stride=8)
    dense.load_state_dict(timm.create_model("affnet_atto").state_dict())


def test_unsupported_output_stride_is_an_error():
    with pytest.raises(ValueError, match="output_stride=4 must be 8, 16 or 32"):
        timm.create_model("affnet_atto", output_stride=4)
