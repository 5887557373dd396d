"""The local relation aggregator of UniFormer: a convolution in the form of attention."""

from torch import Tensor, nn

from .depthwise import depthwise
from .linear import apply_conv
from .registry import token_mixer


@token_mixer("local_mhra")
class LocalMhra(nn.Module):
    """`proj(affinity(value(x)))`: `[B, C, H, W] -> [B, C, H, W]`.

    `value` and `proj` are 1x1 convolutions, `affinity` is a depthwise one: each channel is a head whose weights depend
    only on the relative position within `kernel` x `kernel` pixels (Li et al., arXiv 2201.09450, local multi-head
    relation aggregator). There is no activation between the three. The global aggregator is `FullAttention`.

    Raises ValueError if kernel is even or below 1.
    """

    def __init__(self, dim: int, *, kernel: int = 5):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"LocalMhra: kernel={kernel} must be odd and at least 1, so that a pixel is in its center")
        self.value = nn.Conv2d(dim, dim, 1)
        self.affinity = depthwise(dim, kernel=kernel)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return apply_conv(self.proj, self.affinity(apply_conv(self.value, x)))
