"""Large-kernel attention against a loop over pixels, and the key layouts of VAN."""

import argparse

import golden
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tessel.zoo
from tessel.blocks import LargeKernel


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """A depthwise convolution of one map `[C, H, W]`, as a loop over pixels and taps; outside of the map are zeros."""
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    height, width = x.shape[1:]
    side, step = conv.kernel_size[0], conv.dilation[0]
    out = conv.bias[:, None, None].repeat(1, height, width)
    for i in range(height):
        for j in range(width):
            for a in range(side):
                for b in range(side):
                    y, z = i + step * (a - side // 2), j + step * (b - side // 2)
                    if 0 <= y < height and 0 <= z < width:
                        out[:, i, j] += conv.weight[:, 0, a, b] * x[:, y, z]
    return out


def by_loops(mixer: LargeKernel, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`."""

    def linear(layer: nn.Linear, t: Tensor) -> Tensor:
        return torch.einsum("oc,chw->ohw", layer.weight, t) + layer.bias[:, None, None]

    u = nn.functional.gelu(linear(mixer.proj_in, x))
    gate = linear(mixer.pointwise, convolve(mixer.dilated, convolve(mixer.local, u)))
    return linear(mixer.proj_out, u * gate) + x


@settings(max_examples=15)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5]),
    dilated_kernel=st.sampled_from([3, 7]),
    dilation=st.integers(1, 3),
)
def test_equals_the_loop(height, width, kernel, dilated_kernel, dilation):
    torch.manual_seed(0)
    mixer = LargeKernel(3, kernel=kernel, dilated_kernel=dilated_kernel, dilation=dilation).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
def test_gradcheck(size):
    mixer = LargeKernel(4).double()
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_reach():
    """With the published kernels, a pixel depends on those up to 11 away, and on no others."""
    mixer = LargeKernel(1).double()
    x = torch.randn(1, 1, 1, 41, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[0, 0, 0, 20], x)
    assert grad[0, 0, 0].nonzero().flatten().tolist() == list(range(9, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kernel": 4}, "kernel=4"), ({"dilated_kernel": 0}, "dilated_kernel=0"), ({"dilation": 0}, "dilation=0")],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LargeKernel(16, **arguments)


def test_a_file_of_the_published_layout_loads(tmp_path):
    """A training checkpoint with its arguments; the weights are those of the record, by the keys of the authors."""
    state = golden.published_state(golden.load("van_b0"))
    file = {"epoch": 309, "arch": "van_tiny", "state_dict": state, "args": argparse.Namespace(lr=1e-3)}
    torch.save(file, tmp_path / "van_tiny_754.pth.tar")
    overlay = {"file": str(tmp_path / "van_tiny_754.pth.tar")}
    model = timm.create_model("van_b0.in1k", pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg["mean"] == model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    loaded = tessel.zoo.to_published("van_b0", model.state_dict())
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in state.items())
    assert timm.create_model("van_b4.in1k", device="meta").stages[0].norm.eps == 1e-5


def test_checkpoints_converted_by_openmmlab_load(tmp_path):
    """OpenMMLab renames layers and puts `backbone.` before all but the head."""
    names = {"block": "blocks", ".proj.": ".projection.", "conv0": "DW_conv", "conv_spatial": "DW_D_conv"}
    names |= {"mlp.dwconv.dwconv": "mlp.dwconv"}
    model = timm.create_model("van_atto")
    file = {}
    for key, tensor in tessel.zoo.to_published("van_atto", model.state_dict()).items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        file[key.replace("head.", "head.fc.") if key.startswith("head.") else f"backbone.{key}"] = tensor
    torch.save({"state_dict": file, "meta": {}}, tmp_path / "van.pth")
    options = {"file": str(tmp_path / "van.pth")}
    loaded = timm.create_model("van_atto", pretrained=True, pretrained_cfg_overlay=options)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_initialization_of_the_published_code():
    """Linear layers that stand for 1x1 convolutions are initialized like these, the classifier is not."""
    model = timm.create_model("van_atto", drop_path_rate=0.1)
    block = model.stages[3].blocks[0]
    assert block.mixer.fn.fn.proj_in.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert block.mlp.fn.fn.fc1.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    assert block.mixer.fn.fn.dilated.weight.std().item() == pytest.approx((2 / 49) ** 0.5, rel=0.1)
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (block.mixer.fn.scale.gamma == 0.01).all()
