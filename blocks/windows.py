"""Any token mixer within windows."""

from torch import Tensor, nn

from ..kernels.recording import compact, crop
from .padding import pad_to_multiple


class Windows(nn.Module):
    """Apply `mixer` to each window of a map as if it were an image; `[B, C, H, W] -> [B, C, H, W]`.

    If `window`, the side of the windows, does not divide the map, the map is zero-padded at the bottom and right.

    Raises ValueError if window < 1.
    """

    def __init__(self, mixer: nn.Module, *, window: int):
        super().__init__()
        if window < 1:
            raise ValueError(f"Windows: window={window} must be at least 1")
        self.mixer, self.window = mixer, window

    def forward(self, x: Tensor) -> Tensor:
        (batch, dim, height, width), side = x.shape, self.window
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        x = pad_to_multiple(x.permute(0, 2, 3, 1), side, side)
        cells = compact(x.reshape(batch, rows, side, columns, side, dim).transpose(2, 3))
        y = self.mixer(cells.reshape(batch * rows * columns, side, side, dim).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = compact(y.reshape(batch, rows, columns, side, side, dim).transpose(2, 3))
        return crop(y.reshape(batch, rows * side, columns * side, dim), height, width).permute(0, 3, 1, 2)
