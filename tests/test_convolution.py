"""ConvNormAct gives the results of its layers, and overwrites a map only if nothing else can read that map."""

import pytest
import torch
import torch.nn.functional as F
from dispatched import operators
from torch import nn

from tessel.zoo._convolution import ConvNormAct, activation


def layer(act: str = "") -> ConvNormAct:
    torch.manual_seed(0)
    layer = ConvNormAct(8, 6, kernel=3, act=act)
    for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean, layer.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return layer.eval()


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)


def uses_batch_norm(function) -> bool:
    """Whether a call dispatches PyTorch's batch norm."""
    return any("batch_norm" in name for name in operators(function))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_in_place_gives_the_same_values(dtype, layout):
    ours, x = layer().to(dtype), image(dtype).to(memory_format=layout)
    want = ours(x).detach()  # with gradients: the layers one after the other
    with torch.no_grad():
        assert not uses_batch_norm(lambda: ours(x))
        torch.testing.assert_close(ours(x), want)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), want)


@pytest.mark.parametrize("act", ["silu", "relu", "gelu"])
def test_activation_follows_the_norm(act):
    ours, x = layer(act), image()
    want = getattr(F, act)(ours.norm(ours.conv(x))).detach()
    torch.testing.assert_close(ours(x).detach(), want)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), want)


def test_batch_norm_is_called_in_training_and_under_hooks():
    ours, x = layer(), image()
    with torch.no_grad():
        assert uses_batch_norm(lambda: ours.train()(x))
        ours.eval()
        kept = []
        handle = ours.conv.register_forward_hook(lambda module, args, y: kept.append(y))
        assert uses_batch_norm(lambda: ours(x))
        torch.testing.assert_close(kept[0], F.conv2d(x, ours.conv.weight, padding=1))
        handle.remove()
        ours.norm.register_forward_hook(lambda *args: None)
        assert uses_batch_norm(lambda: ours(x))


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, track_running_stats=False)]
)
def test_other_norms_are_called(norm):
    ours, x = layer(), image()
    ours.norm = norm
    with torch.no_grad():
        torch.testing.assert_close(ours(x), ours.norm(ours.conv(x)))


def test_batch_norm_is_called_in_half_precision():
    ours, x = layer(), image()
    with torch.no_grad():
        assert uses_batch_norm(lambda: ours.bfloat16()(x.bfloat16()))
    ours.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert uses_batch_norm(lambda: ours(x))


def test_replaced_forward_and_global_hooks_see_their_own_result():
    ours, x = layer(), image()
    exact = ours.norm(ours.conv(x)).detach()
    kept = []
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: kept.append((module, y)))
        ours(x)
        handle.remove()
        torch.testing.assert_close(next(y for module, y in kept if module is ours.conv), ours.conv(x))
        ours.norm.forward = lambda x: nn.BatchNorm2d.forward(ours.norm, x) + 5
        torch.testing.assert_close(ours(x), exact + 5)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_vmap_over_a_tensor_of_the_norm(name):
    ours, x = layer(), image()
    tensors = torch.rand(3, 6) + 0.5
    with torch.no_grad():
        y = torch.func.vmap(lambda t: torch.func.functional_call(ours, {f"norm.{name}": t}, (x,)))(tensors)
        for one, tensor in zip(y, tensors, strict=True):
            torch.testing.assert_close(one, torch.func.functional_call(ours, {f"norm.{name}": tensor}, (x,)))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")  # PyTorch itself calls it
def test_derivatives_in_forward_mode_without_gradients():
    ours, x = layer("silu").double(), image(torch.float64)
    with torch.no_grad():
        _, tangent = torch.func.jvp(ours, (x,), (torch.ones_like(x),))
    step = 1e-6
    torch.testing.assert_close(tangent, (ours(x + step) - ours(x - step)).detach() / (2 * step), atol=1e-6, rtol=1e-6)


def test_maps_of_three_axes_raise_the_error_of_torch():
    with torch.no_grad(), pytest.raises(ValueError, match="expected 4D input"):
        layer()(image()[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_trace_is_the_same_with_and_without_gradients():
    ours, x = layer("silu"), image()
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), ours(x))


def test_silu_overwrites_its_input_without_gradients_only():
    act, x = activation("silu"), image()
    y = act(x)
    torch.testing.assert_close(y, F.silu(image()))
    assert torch.equal(x, image())
    with torch.no_grad():
        assert act(x) is x
    torch.testing.assert_close(x, y)
    act.inplace = False
    with torch.no_grad():
        assert act(x) is not x


def test_unknown_activation_is_an_error():
    with pytest.raises(ValueError, match="act='sillu' is not an activation of timm"):
        activation("sillu")
