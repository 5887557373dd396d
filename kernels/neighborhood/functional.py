"""The public function of neighborhood attention and its shape checks.

Shapes as in reference.py, which defines the operator.
"""

from torch import Tensor

from ..dispatch import choose_backend, common_unsupported_reasons
from ..precision import cast_to_autocast
from ..recording import is_open
from ..workload import workload
from .reference import neighborhood_attention_reference

# name -> (B, (H, W), N, D, K, dilation): stages of the published models at 224, 512 and detection sizes
CASES = {
    "mini-stage1-224": (64, (56, 56), 2, 32, 7, 1),
    "mini-stage1-224-dilated": (64, (56, 56), 2, 32, 7, 8),
    "mini-stage2-224": (64, (28, 28), 4, 32, 7, 1),
    "mini-stage3-224": (64, (14, 14), 8, 32, 7, 1),
    "mini-stage4-224": (64, (7, 7), 16, 32, 7, 1),
    "mini-stage1-512-dilated": (2, (128, 128), 2, 32, 7, 16),
    "mini-stage1-800x1333": (2, (200, 334), 2, 32, 7, 1),
    "mini-stage2-800x1333-dilated": (2, (100, 167), 4, 32, 7, 14),
    "large-stage1-384-11x11": (16, (96, 96), 6, 32, 11, 8),
}


def neighborhood_attention(qkv: Tensor, bias: Tensor, *, dilation: int = 1, backend: str | None = None) -> Tensor:
    """Attention of each pixel to the K x K pixels nearest to it, among every `dilation`-th row and column.

    Args:
        qkv: `[B, H, W, 3, N, D]`, the projection's output; H and W are at least K * dilation.
        bias: `[N, 2K - 1, 2K - 1]` with K odd, the bias by row and by column of the key minus those of the query, in
            steps of `dilation` and counted from -(K - 1).
        dilation: distance between neighboring keys in pixels.
        backend: `auto`, `triton` or `reference`; None means the environment variable `TESSEL_KERNELS`.

    Returns:
        `[B, H, W, N, D]`.

    Raises:
        ValueError: shapes that do not fit together. RuntimeError: `backend="triton"` where it cannot run.
    """
    _check(qkv, bias, dilation)
    qkv = cast_to_autocast(qkv)
    batch, height, width, _, heads, _ = qkv.shape
    work = workload(qkv, queries=batch * height * width * heads, keys=((bias.shape[-1] + 1) // 2) ** 2)
    choose_backend("neighborhood_attention", backend, neighborhood_attention_unsupported(qkv), work)
    return neighborhood_attention_reference(qkv, bias, dilation=dilation)


def neighborhood_attention_unsupported(qkv: Tensor) -> list[str]:
    """Return the reasons why no Triton kernel can run on these tensors."""
    return [*common_unsupported_reasons(qkv, head_dim=qkv.shape[-1]), "neighborhood_attention has no Triton kernel"]


def _check(qkv: Tensor, bias: Tensor, dilation: int) -> None:
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(
            f"neighborhood_attention: qkv must be [B, H, W, 3, heads, head_dim], got shape={tuple(qkv.shape)}"
        )
    height, width, _, heads, _ = qkv.shape[1:]
    side = bias.shape[-1]
    if bias.shape != (heads, side, side) or side % 4 != 1:
        raise ValueError(
            f"neighborhood_attention: bias must be [heads={heads}, 2K - 1, 2K - 1] with K odd, got "
            f"shape={tuple(bias.shape)}"
        )
    if dilation < 1:
        raise ValueError(f"neighborhood_attention: dilation={dilation} must be at least 1")
    span = (side + 1) // 2 * dilation
    if not any(is_open(size) for size in (height, width)) and min(height, width) < span:
        raise ValueError(
            f"neighborhood_attention: a map of {height} x {width} pixels is smaller than the window, "
            f"K * dilation = {span}; pad it"
        )
