"""What convolutional families share: convolution with batch norm and activation, and a head that starts with one."""

from timm.layers import ClassifierHead, get_act_layer
from torch import Tensor, nn

from ..blocks import block


class Conv(nn.Conv2d):
    """A convolution without bias that keeps H and W, or divides them by its stride rounding up (odd kernels)."""

    def __init__(self, in_chs: int, out_chs: int, *, kernel: int = 1, stride: int = 1):
        super().__init__(in_chs, out_chs, kernel, stride, kernel // 2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


def activation(name: str) -> nn.Module:
    try:
        layer = get_act_layer(name)
    except KeyError:
        layer = None
    if layer is None:
        raise ValueError(f"act={name!r} is not an activation that timm knows, such as 'relu' or 'silu'")
    return layer(inplace=True)


def conv_norm_act(in_chs: int, out_chs: int, *, kernel: int = 1, stride: int = 1, act: str = "") -> nn.Sequential:
    """Convolution, batch norm, then `act` where one is named."""
    layer = block(conv=Conv(in_chs, out_chs, kernel=kernel, stride=stride), norm=nn.BatchNorm2d(out_chs))
    if act:
        layer.add_module("act", activation(act))
    return layer


class FinalConvHead(ClassifierHead):
    """timm's classifier behind a last 1x1 convolution to `width` channels, batch norm and activation.

    A head without classifier and pooling passes the last stage's map on, so it has no such convolution either.
    """

    def __init__(self, in_chs: int, width: int, num_classes: int, *, act: str, pool_type: str, drop_rate: float):
        super().__init__(width, num_classes, pool_type=pool_type, drop_rate=drop_rate)
        self.final_conv = conv_norm_act(in_chs, width, act=act)

    def reset(self, num_classes: int, pool_type: str | None = None, *, in_features: int, **factory):
        pool_after = self.global_pool.pool_type if pool_type is None else pool_type
        if not num_classes and not pool_after:
            self.final_conv = nn.Identity()
        width = in_features if isinstance(self.final_conv, nn.Identity) else self.in_features
        super().reset(num_classes, pool_type, in_features=width, **factory)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward(self.final_conv(x), pre_logits=pre_logits)
