"""Layers of the convolutional families: convolution, batch norm and activation, heads, and their published weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, NormMlpClassifierHead, create_act_layer
from torch import Tensor, nn
from torch.nn.modules import module

from ..blocks.linear import apply_conv
from ..blocks.plain import is_called_as_defined, is_plain
from ..kernels.recording import exporting, transformed
from ._keymap import Edit

# weights of 1x1 convolutions <-> our linear layers
AS_LINEAR = Edit(
    lambda t: (t.flatten(1) if t.dim() == 4 else t,), lambda t: (t[:, :, None, None] if t.dim() == 2 else t,)
)


def initialize_conv(conv: nn.Conv2d) -> None:
    """He initialization by the fan out, as in the published code of the convolutional families."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def initialize_grouped_conv(conv: nn.Conv2d) -> None:
    """As `initialize_conv`, but with the fan out of one group of channels."""
    fan_out = conv.out_channels * math.prod(conv.kernel_size) // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def activation(name: str) -> nn.Module:
    """timm's activation layer `name`, which overwrites its input where that is faster.

    Raises ValueError for an unknown name.
    """
    try:
        layer = SiLU() if name in ("silu", "swish") else create_act_layer(name, inplace=True)
    except KeyError:
        layer = None
    if layer is None:
        raise ValueError(f"act={name!r} is not an activation of timm, such as 'relu' or 'silu'")
    return layer


class SiLU(nn.SiLU):
    """`x * sigmoid(x)`. It overwrites its input without gradients only: with gradients PyTorch would copy it first."""

    def __init__(self) -> None:
        super().__init__(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=self.inplace and not (torch.is_grad_enabled() or exporting()))


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm and, unless `act` is empty, timm's activation of that name.

    `[B, in_chs, H, W] -> [B, out_chs, ceil(H / stride), ceil(W / stride)]` for odd kernels.
    """

    def __init__(self, in_chs: int, out_chs: int, *, kernel: int = 1, stride: int = 1, act: str = ""):
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_chs)
        self.act = activation(act) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = apply_conv(self.conv, x)
        # a hook of the convolution may keep its result, which must not be overwritten then
        in_place = is_plain(self.conv) and _normalizes_in_place(self.norm, x)
        return self.act(batch_norm_in_place(self.norm, x) if in_place else self.norm(x))


def batch_norm_in_place(norm: Any, x: Tensor) -> Tensor:
    """`norm(x)` with the running statistics: `[B, C, H, W] -> [B, C, H, W]`. The result overwrites `x`."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None], out=x)


def _normalizes_in_place(norm: Any, x: Tensor) -> bool:
    """Whether `batch_norm_in_place(norm, x)` has the result of `norm(x)`.

    It takes less time on the CPU, because `norm` allocates a new map, which takes longer than computing it.
    """
    return (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.track_running_stats
        and is_called_as_defined(norm)
        and not module._global_forward_hooks  # a global hook may keep the convolution's result
        and not (norm.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or exporting())
        and type(x) is Tensor
        and x.ndim == 4
        and x.dtype in (torch.float32, torch.float64)  # in half precision PyTorch's scale is more exact
        and x.device.type == "cpu"
        and not transformed(x)
        and all(t.dtype == x.dtype and t.device == x.device and not transformed(t) for t in _tensors(norm))
    )


def _tensors(norm: Any) -> tuple[Tensor, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


class FinalConvHead(ClassifierHead):
    """A 1x1 convolution to `width` channels with batch norm and activation, then timm's pooling and classifier.

    Without classifier and pooling the head returns the last stage's map as it is and has no convolution.
    """

    def __init__(self, in_chs: int, width: int, num_classes: int, *, act: str, pool_type: str, drop_rate: float):
        super().__init__(width, num_classes, pool_type=pool_type, drop_rate=drop_rate)
        self.final_conv = ConvNormAct(in_chs, width, act=act)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `zoo._backbone.Head.reset` says."""
        new_pool = self.global_pool.pool_type if pool_type is None else pool_type
        if reset_other or not (num_classes or new_pool):
            self.final_conv = nn.Identity()
        width = in_features if isinstance(self.final_conv, nn.Identity) else self.in_features
        super().reset(num_classes, pool_type, in_features=width, device=device, dtype=dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward(self.final_conv(x), pre_logits=pre_logits)


def pooled_norm_head(
    dim: int,
    num_classes: int,
    hidden_size: int | None = None,
    *,
    pool_type: str,
    drop_rate: float,
    norm: str | Callable[[int], nn.Module] = "layernorm2d",
    act: str = "gelu",
) -> NormMlpClassifierHead:
    """timm's head with a norm after the pooling and, with `hidden_size`, a layer of that width.

    Without classifier and pooling the head returns the last stage's map as it is.
    """
    head = NormMlpClassifierHead(
        dim, num_classes, hidden_size, pool_type=pool_type, drop_rate=drop_rate, norm_layer=norm, act_layer=act
    )
    if not num_classes and not pool_type:
        head.reset(0, "", reset_other=True)
    return head
