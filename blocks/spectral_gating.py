"""Spectral gating (SpectFormer): multiplies the spectrum of a map by a learned filter."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.recording import is_open
from .frequency import Parts, in_frequencies
from .registry import token_mixer


@token_mixer("spectral_gating", trained_size=lambda place: place.side)
@register_notrace_module
class SpectralGating(nn.Module):
    """Global circular convolution with a learned kernel for each channel; `x: [B, C, H, W] -> [B, C, H, W]`.

        y = irfft2(G * rfft2(x))

    with a complex number G for each frequency and channel (Patro et al., arXiv 2304.06446, sec. 3).
    `weight: [2, C, S, S//2 + 1]` holds the real, then the imaginary parts of G for a map with sides of
    S = trained_size. For other maps it is resized bicubically with aligned corners, which nearly keeps the kernel's
    size in pixels: the rule of the authors' fine-tuning at other resolutions. `in_frequencies` has the transforms.

    Raises ValueError unless dim and trained_size are positive.
    """

    def __init__(self, dim: int, *, trained_size: int):
        super().__init__()
        if dim < 1 or trained_size < 1:
            raise ValueError(f"SpectralGating: dim={dim} and trained_size={trained_size} must be positive")
        self.weight = nn.Parameter(torch.empty(2, dim, trained_size, trained_size // 2 + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return in_frequencies(x, self.gated)

    def gated(self, spectrum: Tensor) -> Parts:
        """Real and imaginary parts of G * Z, `[B, C, H, F]` each, of the spectrum `[B, C, H, F, 2]` of Z."""
        real, imag = spectrum.unbind(-1)
        height, columns = real.shape[-2:]
        gate = self.weight.to(spectrum.dtype)
        if is_open(height) or is_open(columns) or gate.shape[-2:] != (height, columns):
            gate = F.interpolate(gate, (height, columns), mode="bicubic", align_corners=True)
        return real * gate[0] - imag * gate[1], real * gate[1] + imag * gate[0]
