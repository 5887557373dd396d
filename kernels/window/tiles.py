"""The one decision about tiles that is needed without Triton, to know the shape of the saved statistic."""


def fits_one_tile(pixels: int) -> bool:
    """Whether a window of `pixels` pixels fits one tile. Its backward then needs only qkv, no saved lse."""
    return pixels <= 128
