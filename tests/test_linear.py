"""Linear layers by oneDNN: values, gradients, and when the layer is called instead."""

import pytest
import torch
import torch.nn.functional as F
from dispatched import operators
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tessel.blocks import Mlp
from tessel.blocks.linear import apply_conv, apply_linear, apply_linear_gelu
from tessel.kernels import dispatch
from tessel.kernels import linear as kernel

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture
def onednn(monkeypatch):
    """Small products take oneDNN too, whoever made this CPU."""
    monkeypatch.setattr(kernel, "onednn_is_faster", True)
    monkeypatch.setattr(kernel, "SMALLEST", 0)
    monkeypatch.setattr(dispatch, "default_backend", "auto")


def operands(*shape: int, outputs: int, bias: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (outputs, shape[-1]), *([(outputs,)] if bias else [])]
    return [torch.randn(*s, generator=generator).requires_grad_() for s in shapes]


def calls(function, *args) -> list[str]:
    """Names of the operators of this package that a call dispatches."""
    return [name for name in operators(function, *args) if name.startswith("tessel")]


@given(rows=st.lists(st.integers(0, 5), max_size=3), inputs=st.integers(1, 40), outputs=st.integers(1, 40))
def test_onednn_computes_the_product(rows, inputs, outputs):
    x, weight, bias = (t.detach() for t in operands(*rows, inputs, outputs=outputs))
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(kernel.onednn_linear(x, weight, bias), exact.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kernel.onednn_linear_gelu(x, weight, bias), F.gelu(exact).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [7, 40])
@pytest.mark.parametrize("shape", [(2, 5, 6, 16), (2100, 16)], ids=str)
def test_gradients_are_those_of_a_linear_layer(onednn, shape, outputs, bias):
    tensors = operands(*shape, outputs=outputs, bias=bias)
    dy = torch.randn(*shape[:-1], outputs)
    ours = torch.autograd.grad(kernel.linear(*tensors), tensors, dy)
    theirs = torch.autograd.grad(F.linear(*tensors), tensors, dy)
    for a, b, tensor in zip(ours, theirs, tensors, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
        assert a.is_contiguous() == tensor.is_contiguous()


def test_second_derivatives(onednn):
    def penalty(linear, tensors):
        y = linear(*tensors).sin().sum()
        return torch.autograd.grad(torch.autograd.grad(y, tensors[:2], create_graph=True)[0].square().sum(), tensors)

    tensors = operands(3, 4, 8, outputs=6)
    for a, b in zip(penalty(kernel.linear, tensors), penalty(F.linear, tensors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the check itself
def test_operator_passes_the_checks_of_torch(onednn):
    torch.library.opcheck(kernel.onednn_linear, operands(3, 4, 8, outputs=6))
    torch.library.opcheck(kernel.onednn_linear_gelu, [t.detach() for t in operands(3, 4, 8, outputs=6)])


def test_multiply_adds_are_counted(onednn):
    x, weight, bias = operands(3, 4, 8, outputs=6)
    with FlopCounterMode(display=False) as counter:
        kernel.linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 12 * 8 * 6


def test_only_single_precision_on_the_cpu_takes_onednn(onednn):
    x, weight, _ = operands(3, 8, outputs=6)
    assert kernel.takes_onednn(x, weight)
    assert not kernel.takes_onednn(x.double(), weight.double())
    assert not kernel.takes_onednn(x.bfloat16(), weight.bfloat16())
    assert not kernel.takes_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernel.takes_onednn(x, weight)


def test_operands_that_do_not_fit_raise_the_error_of_torch(onednn):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        kernel.linear(torch.randn(3, 8), torch.randn(6, 9))


def test_reference_backend_takes_the_choice_of_torch(onednn, monkeypatch):
    x, weight, bias = operands(3, 8, outputs=6)
    assert calls(kernel.linear, x, weight, bias) == ["tessel.linear.default"]
    monkeypatch.setattr(dispatch, "default_backend", "reference")
    assert calls(kernel.linear, x, weight, bias) == []


def test_small_products_take_the_choice_of_torch(onednn, monkeypatch):
    monkeypatch.setattr(kernel, "SMALLEST", 3 * 8 * 6 + 1)
    x, weight, _ = operands(3, 8, outputs=6)
    assert not kernel.takes_onednn(x, weight)
    assert kernel.takes_onednn(x.repeat(2, 1), weight)


def test_transforms_of_torch_func(onednn):
    x, weight, bias = (t.detach() for t in operands(3, 4, 8, outputs=6))
    per_sample = torch.func.vmap(kernel.linear, (0, None, None))(x, weight, bias)
    torch.testing.assert_close(per_sample, F.linear(x, weight, bias))
    layer = nn.Linear(8, 6)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    gradient = torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).sum())(weights)
    assert gradient["weight"].shape == (6, 8)


def test_layer_is_called_where_somebody_looks_at_it(onednn):
    layer, x = nn.Linear(8, 6), torch.randn(3, 8)
    assert calls(apply_linear, layer, x) == ["tessel.linear.default"]
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(args))
    assert calls(apply_linear, layer, x) == []
    assert len(seen) == 1


def test_layer_with_a_forward_of_its_own_is_called(onednn):
    layer, x = nn.Linear(8, 6), torch.randn(3, 8)
    layer.forward = lambda x: nn.Linear.forward(layer, x) + 5
    torch.testing.assert_close(apply_linear(layer, x), F.linear(x, layer.weight, layer.bias) + 5)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")  # PyTorch itself calls it
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_derivatives_in_forward_mode(onednn, name):
    layer, x = nn.Linear(8, 6), torch.randn(3, 8)
    tensor = getattr(layer, name).detach()

    def call(tensor):
        tensors = {"weight": layer.weight, "bias": layer.bias, name: tensor}
        return kernel.linear(x, tensors["weight"], tensors["bias"])

    with torch.no_grad():
        _, tangent = torch.func.jvp(call, (tensor,), (torch.ones_like(tensor),))
    want = x.sum(1, keepdim=True).expand(3, 6) if name == "weight" else torch.ones(3, 6)
    torch.testing.assert_close(tangent, want.clone())
    gradient = torch.func.grad(lambda tensor: call(tensor).sum())(tensor)
    assert gradient.shape == tensor.shape and gradient.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")  # PyTorch itself calls it
def test_derivatives_of_dual_tensors(onednn):
    x, weight, bias = (t.detach() for t in operands(3, 8, outputs=6))
    tangent = torch.randn(3, 8)
    with torch.no_grad(), forward_ad.dual_level():
        y = kernel.linear(forward_ad.make_dual(x, tangent), weight, bias)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, tangent @ weight.T)


def test_no_rows(onednn):
    x, weight, bias = operands(0, 8, outputs=6)
    dx, dweight, dbias = torch.autograd.grad(torch.compile(kernel.linear)(x, weight, bias).sum(), [x, weight, bias])
    assert dx.shape == (0, 8) and not dweight.any() and not dbias.any()


def test_layer_of_another_class_is_called(onednn):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(8, 6), torch.randn(3, 8)
    torch.testing.assert_close(apply_linear(layer, x), layer(x))
    assert apply_linear(nn.Identity(), x) is x


def test_gelu_is_part_of_the_product_without_gradients_only(onednn):
    layer, x = nn.Linear(8, 6), torch.randn(3, 8)
    exact = F.gelu(layer(x))
    assert calls(apply_linear_gelu, layer, nn.GELU(), x) == ["tessel.linear.default"]
    with torch.no_grad():
        assert calls(apply_linear_gelu, layer, nn.GELU(), x) == ["tessel.linear_gelu.default"]
        torch.testing.assert_close(apply_linear_gelu(layer, nn.GELU(), x), exact)
        # other activations, and activations that somebody looks at
        tanh = nn.GELU(approximate="tanh")
        torch.testing.assert_close(apply_linear_gelu(layer, tanh, x), tanh(layer(x)), atol=1e-6, rtol=1e-5)
        act, seen = nn.GELU(), []
        act.register_forward_hook(lambda *args: seen.append(args))
        torch.testing.assert_close(apply_linear_gelu(layer, act, x), exact)
        assert len(seen) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)], ids=str)
def test_pointwise_convolution_is_a_linear_layer_without_gradients(onednn, stride, bias):
    conv = nn.Conv2d(8, 6, 1, stride, bias=bias)
    x = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    exact = conv(x)
    assert calls(apply_conv, conv, x) == []
    with torch.no_grad():
        assert calls(apply_conv, conv, x) == ["tessel.linear.default"]
        y = apply_conv(conv, x)
    torch.testing.assert_close(y, exact.detach())
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options", [{"kernel_size": 3}, {"kernel_size": 1, "padding": 1}, {"kernel_size": 1, "groups": 2}]
)
def test_other_convolutions_are_called(onednn, options):
    conv = nn.Conv2d(8, 6, **options)
    x = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert calls(apply_conv, conv, x) == []
        torch.testing.assert_close(apply_conv(conv, x), conv(x))


def test_pointwise_convolution_is_called_for_other_layouts_and_hooks(onednn):
    conv, x = nn.Conv2d(8, 6, 1), torch.randn(2, 8, 5, 7)
    seen = []
    with torch.no_grad():
        assert calls(apply_conv, conv, x) == calls(apply_conv, conv, x[0]) == []
        assert apply_conv(conv, x[0]).shape == (6, 5, 7)
        conv.register_forward_hook(lambda *args: seen.append(args))
        assert calls(apply_conv, conv, x.to(memory_format=torch.channels_last)) == []
    assert len(seen) == 1


def test_other_layers_in_the_place_of_a_convolution_are_called(onednn):
    x = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert apply_conv(nn.Identity(), x) is x


def test_pointwise_convolution_below_vmap(onednn):
    conv, x = nn.Conv2d(8, 6, 1), torch.randn(3, 2, 8, 5, 7)
    with torch.no_grad():
        y = torch.func.vmap(lambda x: apply_conv(conv, x))(x)
        torch.testing.assert_close(y, conv(x.flatten(0, 1)).unflatten(0, (3, 2)))


def test_compiled_block_is_one_graph(onednn):
    mlp, x = Mlp(16), torch.randn(2, 16, 5, 6).requires_grad_()
    compiled = torch.compile(mlp, fullgraph=True)
    expected = mlp(x)
    torch.testing.assert_close(compiled(x), expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()]) for y in (compiled(x), mlp(x)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected.detach())


def test_exported_graph_has_no_operator_of_this_package(onednn):
    mlp, x = Mlp(16).eval(), torch.randn(2, 16, 5, 6)
    graph = torch.export.export(mlp, (x,))
    assert not [node for node in graph.graph.nodes if "tessel" in str(node.target)]
    torch.testing.assert_close(graph.module()(x), mlp(x))
