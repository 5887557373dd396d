"""Adaptive frequency filter (AFFNet): multiplies the spectrum of a map by a mask computed from that spectrum."""

import math
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.precision import acc_dtype, without_autocast
from ..kernels.recording import exporting
from .explanation import Explanation, Pixel
from .registry import divisor, token_mixer

# real and imaginary parts
Parts = tuple[Tensor, Tensor]


@token_mixer("adaptive_frequency_filter", num_groups=divisor(8))
@register_notrace_module
class AdaptiveFrequencyFilter(nn.Module):
    """Global circular convolution with a kernel computed from the input; `x: [B, C, H, W] -> [B, C, H, W]`.

    With Z = rfft2(x), orthonormal, and complex matrices W1, W2 [c, c] in each of G groups of c = C/G channels,

        M = shrink(W2 silu(W1 Z + b1) + b2)        y = irfft2(M * Z)

    at every frequency; silu and shrink(a) = sign(a) * max(|a| - shrinkage, 0) are applied separately to real and
    imaginary parts (Huang et al., arXiv 2307.14008, sec. 3.2 and 3.3; activation and shrinkage are those of the
    released code). `w1, w2: [2, G, c_in, c_out]` and `b1, b2: [2, G, c]` hold the real, then the imaginary parts.

    `in_frequencies` has the transforms.

    Raises ValueError if num_groups does not divide dim or shrinkage is negative.
    """

    def __init__(self, dim: int, *, num_groups: int = 8, shrinkage: float = 0.01):
        super().__init__()
        if num_groups < 1 or dim < 1 or dim % num_groups:
            raise ValueError(
                f"AdaptiveFrequencyFilter: dim={dim} must be positive and divisible by num_groups={num_groups}"
            )
        if not shrinkage >= 0:
            raise ValueError(f"AdaptiveFrequencyFilter: shrinkage={shrinkage} must be zero or positive")
        self.dim, self.num_groups, self.shrinkage = dim, num_groups, shrinkage
        width = dim // num_groups
        self.w1 = nn.Parameter(torch.empty(2, num_groups, width, width))
        self.b1 = nn.Parameter(torch.empty(2, num_groups, width))
        self.w2 = nn.Parameter(torch.empty(2, num_groups, width, width))
        self.b2 = nn.Parameter(torch.empty(2, num_groups, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return in_frequencies(x, self.filtered)

    def filtered(self, spectrum: Tensor) -> Parts:
        """Real and imaginary parts of Z, `[B, C, H, F, 2]`, to those of M * Z, `[B, C, H, F]` each."""
        z = self._by_group(spectrum)
        (z_real, z_imag), (m_real, m_imag) = z.chunk(2, 1), self._mask(z)
        real = torch.addcmul(m_real * z_real, m_imag, z_imag, value=-1)
        imag = torch.addcmul(m_real * z_imag, m_imag, z_real)
        return self._by_channel((real, imag), spectrum)

    def explain(self, x: Tensor, query: Pixel) -> Explanation:
        """The size of the mask at each frequency, mean over channels, the same for all queries."""
        spectrum = torch.view_as_real(torch.fft.rfft2(x.float(), norm="ortho"))
        mask = torch.complex(*self._by_channel(self._mask(self._by_group(spectrum)), spectrum)).abs()[0].mean(0)
        # the other half of the spectrum mirrors this one
        mirrored = mask[:, 1 : (x.shape[3] + 1) // 2].flip(0, 1).roll(1, 0)
        return Explanation(torch.fft.fftshift(torch.cat([mask, mirrored], 1)), "frequencies", "frequency mask")

    def _by_group(self, spectrum: Tensor) -> Tensor:
        """`[B, C, H, F, 2] -> [G, 2*c, B*H*F]`: each complex layer is then one matrix product per group."""
        parts = spectrum.unflatten(1, (self.num_groups, self.dim // self.num_groups)).permute(1, 5, 2, 0, 3, 4)
        batch, (rows, columns) = spectrum.shape[0], spectrum.shape[2:4]
        return parts.reshape(self.num_groups, 2 * (self.dim // self.num_groups), batch * rows * columns)

    def _by_channel(self, parts: tuple[Tensor, Tensor], spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts `[G, c, B*H*F]` of what belongs to `spectrum`, to `[B, C, H, F]` each."""
        sizes = (spectrum.shape[0], *spectrum.shape[2:4])
        real, imag = (part.unflatten(2, sizes).permute(2, 0, 1, 3, 4).flatten(1, 2) for part in parts)
        return real, imag

    def _mask(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts of M by group, of `z: [G, 2*c, B*H*F]`."""
        hidden = F.silu(torch.baddbmm(*as_real(self.b1.to(z.dtype), self.w1.to(z.dtype)), z))
        mask = torch.baddbmm(*as_real(self.b2.to(z.dtype), self.w2.to(z.dtype)), hidden)
        # many runtimes have no `softshrink`
        mask = mask - mask.clamp(-self.shrinkage, self.shrinkage) if exporting() else F.softshrink(mask, self.shrinkage)
        real, imag = mask.chunk(2, 1)
        return real, imag


def in_frequencies(x: Tensor, change: Callable[[Tensor], Parts]) -> Tensor:
    """`irfft2(change(rfft2(x)))` of a map `[B, C, H, W]`, orthonormal, of the same shape and dtype.

    `change` maps the half spectrum `[B, C, H, W//2 + 1, 2]` to real and imaginary parts without the last axis.

    The transforms are computed in float32 or wider. In the spectrum of a real signal some columns are conjugate
    symmetric; those of the changed one are made symmetric before the inverse transform, whose result is otherwise
    undefined on a GPU. The CPU's transform does the same. While exporting, and on a device without such transforms,
    they are products with matrices of cosines and sines, because many runtimes have no complex numbers.
    """
    exact = acc_dtype(x)
    with without_autocast(x):
        if exporting() or not has_fft(x.device.type):
            return by_products(x.to(exact), change).to(x.dtype)
        spectrum = torch.view_as_real(torch.fft.rfft2(x.to(exact), norm="ortho"))
        changed = symmetric(torch.complex(*change(spectrum)), x.shape[-1])
        return torch.fft.irfft2(changed, s=x.shape[-2:], norm="ortho").to(x.dtype)


def by_products(x: Tensor, change: Callable[[Tensor], Parts]) -> Tensor:
    """As `in_frequencies`, by matrix products in real numbers, one axis after the other."""
    height, width = x.shape[-2:]
    cos_h, sin_h = waves(height, height, x)
    cos_w, sin_w = waves(width, width // 2 + 1, x)
    real, imag = x @ cos_w, -(x @ sin_w)
    real, imag = cos_h @ real + sin_h @ imag, cos_h @ imag - sin_h @ real
    real, imag = change(torch.stack([real, imag], -1))
    real, imag = cos_h @ real - sin_h @ imag, cos_h @ imag + sin_h @ real
    # the missing half of the spectrum is the mirror image of the other, except the columns that `symmetric` changes
    column = torch.arange(width // 2 + 1, device=x.device)
    count = 2 - (column == 0).to(x.dtype) - (2 * column == width).to(x.dtype)
    return (real * count) @ cos_w.transpose(0, 1) - (imag * count) @ sin_w.transpose(0, 1)


@torch.compiler.assume_constant_result
def has_fft(device: str) -> bool:
    """Whether devices of this type have complex numbers, transforms of them and their gradients."""
    return device in ("cpu", "cuda", "meta") or _transforms(device)


@cache
def _transforms(device: str) -> bool:
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
            torch.fft.irfft2(symmetric(torch.fft.rfft2(x, norm="ortho"), 4), s=(4, 4), norm="ortho").sum().backward()
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"{device} has no Fourier transforms ({reason}); products of matrices take their place", stacklevel=2
        )
        return False
    return True


def waves(size: int, frequencies: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal cosines and sines `[size, frequencies]` in the dtype of `like`, float32 or wider."""
    options = {"device": like.device, "dtype": like.dtype}
    turns = torch.arange(size, **options)[:, None] * torch.arange(frequencies, **options)
    # whole turns are subtracted, so that angles are small; exactly, as all are whole numbers below 2 ** 24. In integers
    # torch's compiler gets it wrong (docs/upstream.md), and torch's ONNX exporter has no `%` by an open size
    turns = turns - (turns / size).floor() * size
    sides = like.new_full((1,), size)
    angle = turns * (2 * math.pi / sides)
    return angle.cos() * sides.rsqrt(), angle.sin() * sides.rsqrt()


def as_real(bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A complex linear layer as a real one on stacked real and imaginary parts.

    `bias: [2, G, c]`, `weight: [2, G, i, o]` -> `[G, 2*c, 1]`, `[G, 2*o, 2*i]`.
    """
    real, imag = weight.transpose(-2, -1).unbind(0)
    matrix = torch.cat([torch.cat([real, -imag], 2), torch.cat([imag, real], 2)], 1)
    return bias.transpose(0, 1).flatten(1).unsqueeze(2), matrix


def symmetric(spectrum: Tensor, width: int) -> Tensor:
    """Change a half spectrum `[..., H, width//2 + 1]` in place to the nearest spectrum of a real signal."""
    # the columns that are conjugate symmetric: the first, and the last of an even width
    own = spectrum[..., : width // 2 + 1 : max(width // 2, 1)] if width % 2 == 0 else spectrum[..., :1]
    mirrored = own.flip(-2).roll(1, -2).conj()
    own.copy_((own + mirrored) / 2)
    return spectrum
