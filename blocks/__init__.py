"""Parameters and maths: token mixers (one file each), channel mixers, residual branches, embeddings.

Every module maps a feature map to a feature map: `forward(x: [B, C, H, W]) -> [B, C', H', W']`, channels_last memory,
any H, W >= 1, no other argument. `x.permute(0, 2, 3, 1)` is then a free contiguous view.
"""

from .bi_level_routing import BiLevelRouting
from .embed import conv_norm
from .full_attention import FullAttention
from .mlp import Mlp
from .residual import Residual, block, drop_path_rates

__all__ = ["BiLevelRouting", "FullAttention", "Mlp", "Residual", "block", "conv_norm", "drop_path_rates"]
