"""Window attention: the spatial attention of DaViT, that of Swin without shift and position bias."""

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels import window_attention
from ..kernels.recording import compact, crop
from .explanation import Explanation, Pixel, attention, gradient_at
from .linear import apply_linear
from .padding import pad_to_multiple
from .registry import heads, token_mixer


@token_mixer("window", num_heads=heads(32))
@register_notrace_module
class Window(nn.Module):
    """Attention within windows of a fixed size; `x: [B, C, H, W] -> [B, C, H, W]`.

    One linear layer gives q, k and v. In every window w

        y[w] = proj(softmax(q[w] k[w]^T / sqrt(head_dim)) v[w])

    (Ding et al., arXiv 2204.03645, sec. 3.2, eq. 3). `window` is one side or (height, width). If it does not divide the
    map, the map is zero-padded at the bottom and right before the linear layer. Padding is not masked: its keys and
    values are the bias of the linear layer, as in the published models.

    Raises ValueError if num_heads does not divide dim or a side of the window is below 1.
    """

    def __init__(self, dim: int, *, num_heads: int, window: int | tuple[int, int] = 7):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Window: dim={dim} must be divisible by num_heads={num_heads}")
        self.window = (window, window) if isinstance(window, int) else window
        if len(self.window) != 2 or min(self.window) < 1:
            raise ValueError(f"Window: window={window} must be a side of at least 1, or two of them")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        (batch, dim, height, width), (win_h, win_w) = x.shape, self.window
        rows, cols = (height + win_h - 1) // win_h, (width + win_w - 1) // win_w
        x = pad_to_multiple(x.permute(0, 2, 3, 1), win_h, win_w)
        # x is divided into windows before the linear layer, since q, k and v are three times as wide
        cells = compact(x.reshape(batch, rows, win_h, cols, win_w, dim).transpose(2, 3))
        qkv = apply_linear(self.qkv, cells.reshape(batch * rows * cols, win_h, win_w, dim))
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        y = apply_linear(self.proj, window_attention(qkv, windows=(self.window,)).flatten(3))
        y = compact(y.view(batch, rows, cols, win_h, win_w, dim).transpose(2, 3))
        y = y.reshape(batch, rows * win_h, cols * win_w, dim)
        return crop(y, height, width).permute(0, 3, 1, 2)

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The attention weights of the query, which are zero outside its window."""
        qkv = self.qkv(pad_to_multiple(x.permute(0, 2, 3, 1), *self.window)).unflatten(-1, (3, self.num_heads, -1))
        weights = gradient_at(lambda qkv: window_attention(qkv, windows=(self.window,)), qkv, query)[:, :, :, 2]
        return attention(crop(weights, *x.shape[2:]))
