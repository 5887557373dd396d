"""Tools that replace or watch the layers of a model work on all families: adapters, quantizers, hooks, torch.func.

They share one condition: a layer takes part in the forward pass by being called.
"""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import tessel.zoo  # noqa: F401

SIZES = ((64, 64), (41, 53))


# the light UniFormer's second classifier, which only training uses
ONLY_IN_TRAINING = {"head.token_norm", "head.token_fc"}


def perturbed(name: str, **kwargs) -> nn.Module:
    """A small model none of whose branches is zero."""
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


class Adapted(nn.Module):
    """A layer and a low-rank addition to its weight, as in LoRA."""

    def __init__(self, base: nn.Linear | nn.Conv2d):
        super().__init__()
        rows, columns = base.weight.flatten(1).shape
        self.base = base
        self.left, self.right = nn.Parameter(0.1 * torch.randn(rows, 2)), nn.Parameter(0.1 * torch.randn(2, columns))

    def forward(self, x):
        added = (self.left @ self.right).view_as(self.base.weight)
        if isinstance(self.base, nn.Linear):
            return self.base(x) + nn.functional.linear(x, added)
        options = self.base.stride, self.base.padding, self.base.dilation, self.base.groups
        return self.base(x) + nn.functional.conv2d(x, added, None, *options)

    def merged(self) -> nn.Linear | nn.Conv2d:
        with torch.no_grad():
            self.base.weight += (self.left @ self.right).view_as(self.base.weight)
        return self.base


def replace(model: nn.Module, kinds: tuple[type, ...], make) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds) and not isinstance(module, Adapted):
                setattr(module, name, make(child))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d], ids=["linear", "conv"])
def test_adapted_and_merged_layers_agree(model_name, kind):
    model = perturbed(model_name).requires_grad_(False)
    replace(model, (kind,), Adapted)
    named = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    adapters = [module for name, module in named.items() if name not in ONLY_IN_TRAINING]
    xs = [torch.randn(2, 3, *size) for size in SIZES]
    # the map too: where a class token gives the logits, nothing else of the last block reaches them
    (model(xs[0]).square().sum() + model.forward_features(xs[0]).square().sum()).backward()
    assert adapters
    for adapter in adapters:
        assert adapter.left.grad is not None and adapter.left.grad.any()
    outputs = [model(x) for x in xs]
    replace(model, (Adapted,), Adapted.merged)
    for x, adapted in zip(xs, outputs, strict=True):
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4 * adapted.abs().max().item())


def test_every_layer_with_parameters_is_called(model_name):
    """So that hooks see it. Layers are plain torch layers; only mixers and norms own parameters besides."""
    model = perturbed(model_name)
    owners = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    owners -= ONLY_IN_TRAINING
    tables = {name for name in owners if type(model.get_submodule(name)).__name__ == "LogPositionBias"}
    called, hooks = set(), []
    for name in owners:
        hooks.append(model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)))
    for size in SIZES:
        called.clear()
        hooked = model(x := torch.randn(1, 3, *size))
        assert owners - called == set(), "these own parameters and are not called"
    assert tables <= called
    for hook in hooks:
        hook.remove()
    # and calling layers gives the same as reading their weights
    torch.testing.assert_close(model(x), hooked, rtol=1e-4, atol=1e-4 * hooked.abs().max().item())


def test_convolutions_and_linear_layers_can_be_rebuilt(model_name):
    """Adapters and counters construct or look up `type(layer)`: it is torch's or timm's own class."""
    for name, module in perturbed(model_name).named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert type(module) in (nn.Linear, nn.Conv2d), name


def test_gradients_per_image_by_vmap(model_name):
    model, x = perturbed(model_name), torch.randn(3, 3, 41, 53)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).sin().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators without a batching rule of their own
        per_image = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        expected = grad(loss)(parameters, x[i])
        largest = max(g.abs().max() for g in expected.values())
        for name, g in expected.items():
            assert (per_image[name][i] - g).abs().max() <= 1e-4 * largest, name


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and still what many use
def test_dynamic_quantization(model_name):
    model = perturbed(model_name)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        assert torch.cosine_similarity(quantized(x), model(x), dim=1).min() > 0.99


class Scaled(torch.Tensor):
    """A weight stored as codes and scales, as quantizers do: a tensor subclass with nothing but a linear layer."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = (weight / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.codes * weight.scale, *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a quantized weight has no {function}")


def test_quantized_weights_need_nothing_but_linear(model_name):
    model = perturbed(model_name)
    quantized = copy.deepcopy(model)
    for module in quantized.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(Scaled(module.weight.detach()), requires_grad=False)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            assert torch.cosine_similarity(quantized(x), model(x), dim=1).min() > 0.999
