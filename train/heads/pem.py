"""PEM's pixel decoder and transformer decoder, in the form that a `MaskClassifier` takes.

Cavagnero et al., CVPR 2024, arXiv 2402.19422. The published code has no license; this was written from the paper.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ...blocks import PrototypeAttention
from ...kernels.recording import is_open
from .mask_options import PemOptions


class PixelMaps(NamedTuple):
    """What the pixel decoder returns."""

    mask_features: Tensor
    """[B, M, h, w] at the size of the finest map"""
    multi_scale_features: list[Tensor]
    """three maps [B, C, h, w] from coarse to fine"""


class QueryStates(NamedTuple):
    """What the transformer decoder returns, for its first to its last prediction."""

    intermediate_hidden_states: list[Tensor]
    """[Q, B, C]"""
    masks_queries_logits: list[Tensor]
    """[B, Q, h, w]"""


def conv_relu(inputs: int, outputs: int) -> nn.Sequential:
    """A 1 x 1 convolution, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class ChannelGate(nn.Module):
    """x + x g with g = sigmoid(sigmoid(MLP(mean of x))); as published, the gates lie between 0.5 and 0.73."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 1, bias=False),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + x * self.mlp(x.mean((2, 3), keepdim=True)).sigmoid().sigmoid()


class DeformableUp(nn.Module):
    """A modulated deformable 3 x 3 convolution, and its output at twice the size by a transposed convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.offset = nn.Conv2d(dim, 27, 3, padding=1)  # 9 positions of two coordinates, and 9 weights
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3))
        self.norm = nn.BatchNorm2d(dim)
        self.up = nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1, bias=False)
        self.up_norm = nn.BatchNorm2d(dim)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, h, w] -> the convolved map, and the one of 2 h x 2 w"""
        places = self.offset(x)
        # on a CPU the operator has no half precision
        precise = torch.promote_types(x.dtype, torch.float32)
        x, places, weight = (tensor.to(precise) for tensor in (x, places, self.weight))
        x = deform_conv2d(x, places[:, :18], weight, padding=(1, 1), mask=places[:, 18:].sigmoid())
        x = self.norm(x).relu()
        return x, self.up_norm(self.up(x)).relu()


class PemPixelDecoder(nn.Module):
    """PEM's pixel decoder (section 3.3): a pyramid with channel gates and deformable convolutions.

    The mask features come out of a ReLU, as published. channels: of the four maps, from fine to coarse. What comes from
    a coarser map is resized where it is not of the finer map's size. The transposed convolutions have torch's initial
    weights; the published ones are bilinear in one output channel only.
    """

    def __init__(self, channels: Sequence[int], *, dim: int = 128, mask_dim: int = 256):
        super().__init__()
        self.inputs = nn.ModuleList(conv_relu(width, dim) for width in channels)
        self.gates = nn.ModuleList(ChannelGate(dim) for _ in channels)
        self.ups = nn.ModuleList(DeformableUp(dim) for _ in channels[1:])
        self.context = conv_relu(channels[-1], dim)
        self.output = conv_relu(dim, mask_dim)

    def forward(self, maps: Sequence[Tensor]) -> PixelMaps:
        """maps: [B, C_i, H_i, W_i] from fine to coarse"""
        gated = [gate(layer(x)) for gate, layer, x in zip(self.gates, self.inputs, maps, strict=True)]
        up = self.context(maps[-1].mean((2, 3), keepdim=True))
        found = []
        for level in range(len(maps) - 1, 0, -1):
            x, up = self.ups[level - 1](gated[level] + up)
            found.append(x)
            up = resized(up, gated[level - 1])
        return PixelMaps(self.output(gated[0] + up), found)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the size of `like`."""
    size = like.shape[2:]
    if any(map(is_open, size)) or x.shape[2:] != size:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    return x


class PemLayer(nn.Module):
    """Prototype cross-attention, self-attention of the queries, and an MLP, with norms before them."""

    def __init__(self, dim: int, *, heads: int, hidden: int, rescue: str):
        super().__init__()
        self.cross = PrototypeAttention(dim, num_heads=heads, rescue=rescue)  # type: ignore[arg-type]
        self.norm1, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)),
        )

    def forward(self, query: Tensor, x: Tensor, mask: Tensor, position: Tensor, query_position: Tensor) -> Tensor:
        query = self.cross(query, x, mask, position=position, query_position=query_position)
        normed = self.norm1(query)
        asked = normed + query_position
        query = query + self.attention(asked, asked, normed, need_weights=False)[0]
        return query + self.mlp(self.norm2(query))


class PemDecoder(nn.Module):
    """PEM's transformer decoder (section 3.1): `layers` layers, each of which reads one of three maps in turns.

    channels: of the maps. There is a prediction before the first layer and after each.
    """

    def __init__(
        self,
        channels: int,
        *,
        dim: int = 256,
        queries: int = 100,
        heads: int = 8,
        hidden: int = 2048,
        layers: int = 6,
        mask_dim: int = 256,
        rescue: str = "query",
    ):
        super().__init__()
        self.query, self.query_position = nn.Embedding(queries, dim), nn.Embedding(queries, dim)
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.inputs = nn.ModuleList(nn.Conv2d(channels, dim, 1) for _ in range(3))
        self.layers = nn.ModuleList(PemLayer(dim, heads=heads, hidden=hidden, rescue=rescue) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.mask = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, mask_dim)
        )
        for layer in self.inputs:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, *, multi_scale_features: Sequence[Tensor], mask_features: Tensor) -> QueryStates:
        """multi_scale_features: three maps [B, channels, h, w], the coarsest first; mask_features: [B, M, H, W]"""
        batch = mask_features.shape[0]
        maps = [
            layer(x) + level[:, None, None]
            for layer, x, level in zip(self.inputs, multi_scale_features, self.level_embed, strict=True)
        ]
        positions = [sine_position(x) for x in maps]
        query, place = (part.weight.expand(batch, -1, -1) for part in (self.query, self.query_position))
        states = QueryStates([], [])
        for number in range(len(self.layers) + 1):
            normed = self.norm(query)
            mask = torch.einsum("bqc,bchw->bqhw", self.mask(normed), mask_features)
            states.intermediate_hidden_states.append(normed.transpose(0, 1))
            states.masks_queries_logits.append(mask)
            if number < len(self.layers):
                x = maps[number % 3]
                small = F.interpolate(mask.detach(), x.shape[2:], mode="bilinear", align_corners=False)
                query = self.layers[number](query, x, small, positions[number % 3], place)
        return states


def sine_position(x: Tensor) -> Tensor:
    """Sine position encoding [1, C, H, W] of a map [B, C, H, W], C a multiple of 4 (arXiv 2005.12872, appendix).

    The first half of the channels encodes the row, the other half the column, both from 0 to 2 pi.
    """
    channels, height, width = x.shape[1:]
    precise = torch.promote_types(x.dtype, torch.float32)
    index = torch.arange(channels // 2, device=x.device)
    period = 10000 ** (2 * (index // 2).to(precise) / (channels // 2))

    def encode(size: int) -> Tensor:  # [size, C / 2]
        place = torch.arange(1, size + 1, device=x.device, dtype=precise) / (size + 1e-6) * (2 * math.pi)
        angle = place[:, None] / period
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)

    rows = encode(height).T[:, :, None].expand(-1, -1, width)
    columns = encode(width).T[:, None].expand(-1, height, -1)
    return torch.cat((rows, columns))[None].to(x.dtype)


def pem_parts(options: PemOptions, channels: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """PEM's pixel decoder and transformer decoder on four maps of these channels, from fine to coarse."""
    pixels = PemPixelDecoder(channels, dim=options.feature_size, mask_dim=options.mask_feature_size)
    decoder = PemDecoder(
        options.feature_size,
        dim=options.hidden_dim,
        queries=options.num_queries,
        heads=options.num_attention_heads,
        hidden=options.dim_feedforward,
        layers=options.decoder_layers - 1,
        mask_dim=options.mask_feature_size,
        rescue=options.rescue,
    )
    return pixels, decoder
