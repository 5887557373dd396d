"""Prototype cross-attention of PEM: each query and head takes one pixel, the most similar one in its mask.

Cavagnero et al., "PEM: Prototype-based Efficient MaskFormer for Image Segmentation", CVPR 2024, arXiv 2402.19422. The
published code has no license; this was written from the paper.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import apply_linear


class PrototypeAttention(nn.Module):
    """PEM-CA (section 3.2): queries are fused with their prototypes, the most similar pixels, by a product.

    With pixels k and queries q projected and scaled to unit length over all channels, the prototype of a query and head
    is the pixel with the largest k q among those where the query's mask is not negative, and

        y = W2(a * norm(W1(k q)) + k) + query

    where norm scales each channel to unit length over the queries. No gradient reaches the choice or the mask.
    rescue: what takes any pixel if a mask has none left, the "query" itself, or, as published, all queries of an
    "image" if none of them has a pixel; a query without pixels beside others then takes the first pixel of the map.
    Raises ValueError if the heads do not divide the channels.
    """

    def __init__(self, dim: int, *, num_heads: int = 8, rescue: Literal["query", "image"] = "query"):
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} do not divide dim={dim}")
        if rescue not in ("query", "image"):
            raise ValueError(f"rescue={rescue!r} must be query or image")
        super().__init__()
        self.num_heads, self.rescue = num_heads, rescue
        self.norm_pixels = nn.BatchNorm2d(dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pixels = nn.Linear(dim, dim)
        self.norm_query, self.query = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.product, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(
        self,
        query: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        position: Tensor | None = None,
        query_position: Tensor | None = None,
    ) -> Tensor:
        """query: [B, Q, C]; x: [B, C, H, W]; mask: logits [B, Q, H, W], below 0: no pixel of the query -> [B, Q, C]

        position, query_position: added to x and, before its projection only, to query.
        """
        x = x if position is None else x + position
        positioned = query if query_position is None else query + query_position
        pixels = apply_linear(self.pixels, self.depthwise(self.norm_pixels(x)).flatten(2).transpose(1, 2))
        pixels = F.normalize(pixels, dim=-1)  # [B, N, C]
        asked = F.normalize(self.query(self.norm_query(positioned)), dim=-1)
        index = self.choose(asked.detach(), pixels.detach(), mask)
        heads = pixels.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, C / heads]
        taken = heads.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, heads.shape[-1]))
        prototype = taken.transpose(1, 2).flatten(2)  # [B, Q, C]
        fused = F.normalize(self.product(prototype * asked), dim=1)
        return self.proj(self.scale * fused + prototype) + query

    @torch.no_grad()
    def choose(self, query: Tensor, pixels: Tensor, mask: Tensor | None) -> Tensor:
        """The pixel of each query and head: query [B, Q, C]; pixels [B, N, C] -> indices [B, heads, Q]"""
        query, pixels = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, pixels))
        scores = query @ pixels.transpose(-2, -1)
        if mask is not None:
            blocked = mask.flatten(2) < 0
            empty = blocked.all(-1, keepdim=True)  # [B, Q, 1]
            if self.rescue == "image":
                empty = empty.all(1, keepdim=True)
            scores = scores.masked_fill((blocked & ~empty).unsqueeze(1), float("-inf"))
        return scores.argmax(-1)
