"""Linear layers in single precision on a CPU: by oneDNN where it is faster than PyTorch's own choice.

On x86 PyTorch computes matrix products in float32 by MKL, which uses AVX-512 on Intel's processors only. oneDNN, which
PyTorch brings along, uses it on all: on AMD's Zen 5 it takes less than half the time (benchmarks/linear.py measures
both).
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .precision import autocast_dtype
from .recording import exporting, transformed

# Products of fewer multiply-adds take less time than the call of an operator that is defined in Python.
SMALLEST = 1 << 22


def _maker() -> str:
    """The vendor of the CPU as it names itself: `GenuineIntel`, `AuthenticAMD`."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")


def _is_onednn_faster() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in _maker()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


# looked up once, outside of functions that torch.compile traces
onednn_is_faster = _is_onednn_faster()


def takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` computes this product by oneDNN. `TESSEL_KERNELS=reference` prevents it."""
    return (
        onednn_is_faster
        and dispatch.default_backend != "reference"
        and type(x) in (Tensor, nn.Parameter)  # no subclass: it may compute linear layers in its own way
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1:] == weight.shape[1:]  # else torch's error is the clearer one
        and x.dtype == weight.dtype == autocast_dtype(x) == torch.float32
        and not exporting()
        and not transformed(x)
        and not transformed(weight)
        and (bias is None or not transformed(bias))
        and (torch.compiler.is_compiling() or x.numel() * weight.shape[0] >= SMALLEST)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight^T + bias`: `x: [..., K]`, `weight: [M, K]`, `bias: [M]` -> `[..., M]`."""
    return onednn_linear(x, weight, bias) if takes_onednn(x, weight, bias) else F.linear(x, weight, bias)


# An operator of its own: in a graph of torch.compile oneDNN's takes constant weights only, and it has no backward.
@torch.library.custom_op("tessel::linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by oneDNN, with gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@onednn_linear.register_fake
def _empty(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """`dy^T x`: `[rows, K]`, `[rows, M]` -> `[M, K]`, contiguous as the weight is."""
    rows, outputs = dy.shape
    if rows == 0:  # oneDNN raises an error for a product over zero rows
        return dy.t() @ x
    if outputs > x.shape[1] and rows >= 2048:  # then the transposed product is faster, though it is copied
        return onednn_linear(x.t(), dy.t(), None).t().contiguous()
    return onednn_linear(dy.t(), x.t(), None)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dweight = dbias = None
    rows = dy.flatten(0, -2)
    if ctx.needs_input_grad[0]:
        dx = onednn_linear(dy, weight.t(), None)
    if ctx.needs_input_grad[1]:
        dweight = _weight_gradient(x.flatten(0, -2), rows)
    if ctx.needs_input_grad[2]:
        dbias = rows.sum(0)
    return dx, dweight, dbias


onednn_linear.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("tessel::linear_gelu", mutates_args=())
def onednn_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(linear(x, weight, bias))` by oneDNN in one pass, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")


onednn_linear_gelu.register_fake(_empty)


@register_flop_formula([torch.ops.tessel.linear, torch.ops.tessel.linear_gelu])
def _flops(x, weight, *args, out_shape=None, **kwargs) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]
