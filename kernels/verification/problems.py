"""For each operator the inputs of a case, the baselines that compute the same, and lower bounds of the time.

Each baseline is the fastest form we know. Masks that depend only on shapes, and the block mask of the routing, are
built outside the timed call. For windows and halo the eager reference already is PyTorch's fused attention on
partitioned windows, so there is no separate SDPA baseline.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .. import aggregated, halo, neighborhood, routed, window
from ..halo.reference import split_blocks
from ..halo.relative import reachable_logits
from ..routed.regions import merge_regions, split_regions
from ..window.tiles import Case
from ..workload import Workload

Run = Callable[..., Tensor]

SINGLE = ", one image"  # end of the name of a case
MAX_MASK_BYTES = 4 << 30  # of the boolean mask of all pairs
FLEX_SEQUENCE = 4096  # target length of the sequences into which windows are packed for FlexAttention


class Cost(NamedTuple):
    """The least that one pass needs: bytes read and written, FLOPs of matrix products, exponentials."""

    bytes: int
    flop: int
    exponentials: int


class Problem:
    """Inputs of one case of an operator (all with gradients) and the implementations that are compared.

    `case` is a value of the operator's `CASES`. Subclasses define how the operator is called (`apply`), the number of
    queries over all heads and images, the number of keys per query, their dims, and the baselines.
    """

    op: Run
    op_reference: Run
    tensors: list[Tensor]
    queries: int
    keys: int
    dims: tuple[int, int]  # of keys, of values

    def __init__(self, case: tuple, dtype: torch.dtype, device: str):
        raise NotImplementedError

    @property
    def device(self) -> str:
        return self.tensors[0].device.type

    def apply(self, op: Run, tensors: Sequence[Tensor], **options) -> Tensor:
        raise NotImplementedError

    def triton(self, *tensors: Tensor) -> Tensor:
        return self.apply(type(self).op, tensors, backend="triton")

    def eager(self, *tensors: Tensor) -> Tensor:
        return self.apply(type(self).op_reference, tensors)

    def plain(self, *tensors: Tensor) -> Tensor:
        """What `backend="auto"` runs without a verdict."""
        return self.eager(*tensors)

    def workload(self, *, training: bool) -> Workload:
        return Workload(self.dims[0], self.keys, self.queries, self.tensors[0].dtype, training)

    def baselines(self) -> dict[str, Callable[[], Run]]:
        """Name -> function that builds a baseline beside eager and compiled PyTorch.

        The function raises NotImplementedError if the baseline cannot compute this case.
        """
        return {}

    def parts(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name the gradients of `tensors`. Gradients that may cancel to nearly zero are joined with others."""
        return _split_qkv(grads[0])

    def in_float64(self) -> list[Tensor]:
        return [x.detach().double().requires_grad_() for x in self.tensors]

    def costs(self) -> tuple[Cost, Cost]:
        """Lower bounds of the forward pass and of the backward pass.

        Forward reads each input once and writes the output. Backward reads the inputs and the gradient of the output
        and writes the gradients of the inputs. Forward has two products of queries and keys, backward five, and both
        need the softmax weights.
        """
        key_dim, value_dim = self.dims
        inputs = sum(x.numel() * x.element_size() for x in self.tensors)
        out = self.queries * value_dim * self.tensors[0].element_size()
        pairs = self.queries * self.keys
        return (
            Cost(inputs + out, 2 * pairs * (key_dim + value_dim), pairs),
            Cost(2 * inputs + out, 2 * pairs * (3 * key_dim + 2 * value_dim), pairs),
        )


def _split_qkv(dqkv: Tensor) -> dict[str, Tensor]:
    return dict(zip("qkv", dqkv.unbind(3), strict=True))


def _leaf(*shape: int, dtype: torch.dtype, device: str, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * std).to(dtype).requires_grad_()


class Routed(Problem):
    op, op_reference = routed.routed_attention, routed.routed_attention_reference

    def __init__(self, case: tuple, dtype: torch.dtype, device: str):
        batch, (height, width), self.grid, heads, head_dim, topk = case
        regions = self.grid[0] * self.grid[1]
        self.tensors = [_leaf(batch, height, width, 3, heads, head_dim, dtype=dtype, device=device)]
        self.index = torch.rand(batch, regions, regions, device=device).topk(topk).indices
        self.size, self.scale, self.dims = (height, width), head_dim**-0.5, (head_dim, head_dim)
        self.region = height * width // regions
        self.queries, self.keys = batch * height * width * heads, topk * self.region

    def apply(self, op: Run, tensors: Sequence[Tensor], **options) -> Tensor:
        return op(tensors[0], self.index, grid=self.grid, scale=self.scale, **options)

    def plain(self, *tensors: Tensor) -> Tensor:
        return self.apply(type(self).op, tensors, backend="auto")

    def baselines(self) -> dict[str, Callable[[], Run]]:
        return {"masked SDPA": self._masked, "FlexAttention": self._flex}

    def _routing_mask(self) -> Tensor:
        """Boolean mask of query regions and their routed regions, `[B, R, R]`."""
        batch, regions, _ = self.index.shape
        none = torch.zeros(batch, regions, regions, dtype=torch.bool, device=self.device)
        return none.scatter(2, self.index, True)

    def _masked(self) -> Run:
        pixels = self.size[0] * self.size[1]
        if (needed := self.index.shape[0] * pixels**2) > MAX_MASK_BYTES:
            raise NotImplementedError(f"the mask of all pairs takes {needed >> 30} GiB")
        ids = torch.arange(self.index.shape[1], device=self.device).view(1, *self.grid, 1, 1)
        region = ids.expand(1, *self.grid, *(n // g for n, g in zip(self.size, self.grid, strict=True)))
        region = region.transpose(2, 3).flatten()

        def run(qkv: Tensor) -> Tensor:
            q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
            mask = self._routing_mask()[:, region][:, :, region][:, None]
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)
            return y.transpose(1, 2).unflatten(1, self.size)

        return run

    def _flex(self) -> Run:
        if self.region % 64:
            raise NotImplementedError(f"regions of {self.region} pixels are too small for blocks of FlexAttention")
        batch, regions, topk = self.index.shape
        # all blocks are full blocks, so mask_mod is not evaluated per pair
        count = torch.full((batch, 1, regions), topk, dtype=torch.int32, device=self.device)
        blocks = F.pad(self.index.int(), (0, regions - topk))[:, None]
        routed_pairs = self._routing_mask()
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(count),
            torch.zeros_like(blocks),
            count,
            blocks,
            BLOCK_SIZE=self.region,
            mask_mod=lambda image, head, query, key: routed_pairs[image, query // self.region, key // self.region],
        )

        def run(qkv: Tensor) -> Tensor:
            regions_BRNrD = (split_regions(x, self.grid) for x in qkv.unbind(3))
            q, k, v = (x.transpose(1, 2).flatten(2, 3) for x in regions_BRNrD)
            y: Any = flex_attention(q, k, v, block_mask=mask, scale=self.scale)
            return merge_regions(y.unflatten(2, (regions, -1)).transpose(1, 2), self.grid, self.size)

        return compiled(run, self.device)


class Window(Problem):
    op, op_reference = window.window_attention, window.window_attention_reference

    def __init__(self, case: tuple, dtype: torch.dtype, device: str):
        batch, (height, width), heads, head_dim, self.windows, self.lepe, self.bias, stride, start = Case(*case)
        channels = heads // len(self.windows) * head_dim
        self.place = {"stride": stride, "start": start}
        self.tensors = [_leaf(batch, height, width, 3, heads, head_dim, dtype=dtype, device=device)]
        for _ in range(len(self.windows) * self.lepe):
            self.tensors.append(_leaf(channels, 1, 3, 3, dtype=dtype, device=device, std=1 / 3))
            self.tensors.append(_leaf(channels, dtype=dtype, device=device))
        if self.bias != "none":
            (h, w), exact = self.windows[0], torch.promote_types(dtype, torch.float32)
            shape = (h * w, h * w) if self.bias == "dense" else (2 * h - 1, 2 * w - 1)
            self.tensors.append(_leaf(heads, *shape, dtype=exact, device=device))
        self.dims = (head_dim, head_dim)
        self.queries = batch * height * width * heads
        self.keys = sum(h * w for h, w in self.windows) // len(self.windows)

    def apply(self, op: Run, tensors: Sequence[Tensor], **options) -> Tensor:
        if self.bias != "none":
            return op(tensors[0], windows=self.windows, bias=tensors[1], **self.place, **options)
        lepe = list(zip(tensors[1::2], tensors[2::2], strict=True)) or None
        return op(tensors[0], windows=self.windows, lepe=lepe, **self.place, **options)

    def workload(self, *, training: bool) -> Workload:
        return super().workload(training=training)._replace(bias=self.bias != "none")

    def parts(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        if self.bias != "none":
            return {**_split_qkv(grads[0]), "bias": grads[1]}
        names = [f"{name} {g}" for g in range(len(self.windows)) for name in ("weight", "bias")]
        return _split_qkv(grads[0]) | dict(zip(names, grads[1:], strict=False))

    def baselines(self) -> dict[str, Callable[[], Run]]:
        return {"FlexAttention": self._flex}

    def _flex(self) -> Run:
        """The reference, with its windows packed into longer sequences with a block-diagonal mask."""
        if self.bias != "none" or self.place != {"stride": 1, "start": None}:
            raise NotImplementedError("a bias and windows that begin at a given pixel have no sequences to pack")
        batch, height, width = self.tensors[0].shape[:3]
        masks: dict[int, tuple[int, BlockMask]] = {}
        for h, w in self.windows:
            tokens, count = h * w, batch * -(-height // h) * -(-width // w)
            pack = max(n for n in range(1, max(1, FLEX_SEQUENCE // tokens) + 1) if count % n == 0)
            masks[tokens] = pack, block_mask(_same_window(tokens), pack * tokens, pack * tokens, self.device)

        def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
            tokens = q.shape[2]
            pack, mask = masks[tokens]
            q, k, v = (x.transpose(1, 2).unflatten(0, (-1, pack)).flatten(1, 2).transpose(1, 2) for x in (q, k, v))
            y: Any = flex_attention(q, k, v, block_mask=mask, scale=scale)
            return y.transpose(1, 2).unflatten(1, (pack, tokens)).flatten(0, 1).transpose(1, 2)

        body = compiled(self.eager, self.device)

        def run(*tensors: Tensor) -> Tensor:
            with mock.patch.object(window.reference, "fused_attention", attend):
                return body(*tensors)

        return run


def _same_window(tokens: int) -> Callable:
    return lambda batch, head, query, key: query // tokens == key // tokens


class Halo(Problem):
    op, op_reference = halo.halo_attention, halo.halo_attention_reference

    def __init__(self, case: tuple, dtype: torch.dtype, device: str):
        batch, (height, width), heads, head_dim, value_dim, block_size, halo_size, stride = case
        query_shape = (batch, -(-height // stride), -(-width // stride), heads)
        window_side = block_size + 2 * halo_size
        options = {"dtype": dtype, "device": device}
        tables = [_leaf(2 * window_side - 1, head_dim, std=head_dim**-0.5, **options) for _ in "hw"]
        self.tensors = [
            _leaf(*query_shape, head_dim, **options),
            _leaf(batch, height, width, heads, head_dim + value_dim, **options),
            *tables,
        ]
        self.options = {"block_size": block_size, "halo_size": halo_size, "stride": stride}
        self.dims = (head_dim, value_dim)
        self.queries, self.keys = math.prod(query_shape), window_side**2

    def apply(self, op: Run, tensors: Sequence[Tensor], **options) -> Tensor:
        return op(*tensors, **self.options, **options)

    def parts(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        dq, dkv, *tables = grads
        dk, dv = dkv.split(self.dims, -1)
        return {"q": dq, "k": dk, "v": dv, "tables": torch.cat(tables)}

    def baselines(self) -> dict[str, Callable[[], Run]]:
        return {"FlexAttention": self._flex}

    def _flex(self) -> Run:
        """Queries and keys in block order, a block mask for each block's window, relative logits by score_mod."""
        block, reach, stride = self.options.values()
        side, window_side = block // stride, block + 2 * reach
        if reach > block:
            raise NotImplementedError(f"halo_size={reach} above block_size={block} needs more than one ring of blocks")
        batch, height, width = self.tensors[1].shape[:3]
        rows, cols = -(-height // block), -(-width // block)

        def place_in_window(query, key):
            """Row and column of a key in the window of the query's block."""
            of_query, of_key = query // side**2, key // block**2
            y = (of_key // (cols + 2) - 1 - of_query // cols) * block + key % block**2 // block + reach
            x = (of_key % (cols + 2) - 1 - of_query % cols) * block + key % block + reach
            return y, x

        def within(image, head, query, key):
            y, x = place_in_window(query, key)
            return (y >= 0) & (y < window_side) & (x >= 0) & (x < window_side)

        mask = block_mask(within, rows * cols * side**2, (rows + 2) * (cols + 2) * block**2, self.device)

        def run(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
            def sequences(x: Tensor, side: int, rows: int, cols: int) -> Tensor:
                tokens = split_blocks(x, side, rows, cols).unflatten(0, (batch, -1)).flatten(1, 3)
                return tokens.transpose(1, 2)

            rel = reachable_logits(q, height_rel, width_rel, side)
            rel_rows, rel_cols = (sequences(x, side, rows, cols) for x in rel.unbind(-2))
            ringed = F.pad(kv, (0, 0, 0, 0, block, 0, block, 0))
            k, v = sequences(ringed, block, rows + 2, cols + 2).split(self.dims, -1)

            def add_relative(score, image, head, query, key):
                y, x = place_in_window(query, key)
                y = (y - query % side**2 // side + side - 1).clamp(0, window_side + side - 2)
                x = (x - query % side + side - 1).clamp(0, window_side + side - 2)
                return score + rel_rows[image, head, query, y] + rel_cols[image, head, query, x]

            y: Any = flex_attention(sequences(q, side, rows, cols), k, v, score_mod=add_relative, block_mask=mask)
            y = y.transpose(1, 2).unflatten(1, (rows, cols, side, side)).transpose(2, 3)
            return y.flatten(3, 4).flatten(1, 2)[:, : q.shape[1], : q.shape[2]]

        return compiled(run, self.device)


class Aggregated(Problem):
    op, op_reference = aggregated.aggregated_attention, aggregated.aggregated_attention_reference
    names = ("temperature", "query_embedding", "local_bias", "filters", "filter_bias")

    def __init__(self, case: tuple, dtype: torch.dtype, device: str):
        batch, size, grid, heads, head_dim = case
        self.indices = tuple(_distances(n, k).to(device) for n, k in zip(size, grid, strict=True))
        table = [int(_distances(n, k).max()) + 1 for n, k in zip(size, grid, strict=True)]
        exact = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}  # as under autocast
        self.tensors = [
            _leaf(batch, *size, 3, heads, head_dim, dtype=dtype, device=device),
            _leaf(batch, *grid, 2, heads, head_dim, dtype=dtype, device=device),
            _leaf(heads, *table, **exact),
            _leaf(heads, 1, 1, **exact),
            _leaf(heads, 1, head_dim, std=head_dim**-0.5, **exact),
            _leaf(heads, 9, **exact),
            _leaf(heads, head_dim, 9, **exact),
            _leaf(heads, 1, 9, **exact),
        ]
        self.dims = (head_dim, head_dim)
        self.queries, self.keys = batch * size[0] * size[1] * heads, 9 + grid[0] * grid[1]

    def apply(self, op: Run, tensors: Sequence[Tensor], **options) -> Tensor:
        qkv, pooled, table, *parameters = tensors
        named = dict(zip(self.names, parameters, strict=True))
        return op(qkv, pooled, (table, *self.indices), **named, **options)

    def parts(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        dqkv, dpooled, table, temperature, embedding, *window = grads
        # joined, because the gradient of the temperature is a single sum over all pixels, which may cancel
        named = {"table": table, "query": torch.cat((temperature, embedding), 2)}
        pooled = dict(zip(("pooled k", "pooled v"), dpooled.unbind(3), strict=True))
        return _split_qkv(dqkv) | pooled | named | dict(zip(self.names[2:], window, strict=True))

    def baselines(self) -> dict[str, Callable[[], Run]]:
        return {"FlexAttention": self._flex}

    def _flex(self) -> Run:
        raise NotImplementedError("the filters are added to the weights after the softmax")


def _distances(queries: int, keys: int) -> Tensor:
    """`[keys, queries]`: index of the distance of each query from the center of each pooled key along an axis."""
    key = torch.arange(keys)[:, None]
    # Twice a distance is an integer. If all bins have one size, distances differ by whole pixels: halve the index.
    twice = 2 * torch.arange(queries) - key * queries // keys - ((key + 1) * queries + keys - 1) // keys
    index = twice if queries % keys else twice.div(2, rounding_mode="floor")
    return index - index.min()


class Neighborhood(Problem):
    op, op_reference = neighborhood.neighborhood_attention, neighborhood.neighborhood_attention_reference

    def __init__(self, case: tuple, dtype: torch.dtype, device: str):
        batch, (height, width), heads, head_dim, kernel, self.dilation = case
        side = 2 * kernel - 1
        self.tensors = [
            _leaf(batch, height, width, 3, heads, head_dim, dtype=dtype, device=device),
            _leaf(heads, side, side, dtype=dtype, device=device),
        ]
        self.dims = (head_dim, head_dim)
        self.queries, self.keys = batch * height * width * heads, kernel**2

    def apply(self, op: Run, tensors: Sequence[Tensor], **options) -> Tensor:
        return op(*tensors, dilation=self.dilation, **options)

    def parts(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        return {**_split_qkv(grads[0]), "bias": grads[1]}


PROBLEMS: dict[str, type] = {
    "routed": Routed,
    "window": Window,
    "halo": Halo,
    "aggregated": Aggregated,
    "neighborhood": Neighborhood,
}

# cases of the correctness check alone: more programs in one launch than the second axis of a grid can hold
MANY_PROGRAMS = {
    "routed": (1024, (14, 14), (7, 7), 2, 16, 1),
    "window": (66000, (6, 6), 1, 16, ((6, 6),), False),
    "halo": (8200, (4, 4), 8, 8, 8, 4, 1, 1),
    "aggregated": (2800, (6, 6), (2, 2), 12, 8),
    "neighborhood": (8200, (3, 4), 8, 8, 3, 1),
}
# small cases for the interpreter
INTERPRETED_CASES = {
    "routed": {"two-regions": (1, (4, 8), (1, 2), 1, 16, 1)},
    "window": {
        "stripes": (1, (3, 2), 2, 16, ((3, 1), (1, 2)), True),
        "squares-windows": (2, (2, 2), 1, 16, ((2, 2),), False),
        "shifted": (1, (3, 4), 1, 16, ((2, 2),), False, "table", 1, 1),
        "long": (1, (3, 4), 1, 16, ((2, 2),), False, "dense", 2, 0),
    },
    "halo": {"one-block": (1, (3, 4), 1, 16, 16, 4, 1, 1)},
    "aggregated": {"map": (1, (2, 3), (1, 2), 1, 8)},
    "neighborhood": {"classes": (1, (6, 7), 1, 16, 3, 2)},
}


def cases(operator: str, *, interpreted: bool = False) -> dict[str, tuple]:
    """Return the cases of an operator, those of 224 and 256 pixels first, because the time may run out for the last.

    Those of batch 64 are there a second time, as one image, with the name `CASE, one image`.
    """
    if interpreted:
        return INTERPRETED_CASES[operator]
    modules = {"routed": routed, "window": window, "halo": halo, "aggregated": aggregated, "neighborhood": neighborhood}
    found = modules[operator].CASES
    single = {f"{name}{SINGLE}": (case[0] // 64, *case[1:]) for name, case in found.items() if case[0] % 64 == 0}
    return dict(sorted((found | single).items(), key=lambda item: "-224" not in item[0] and "-256" not in item[0]))


def block_mask(mask: Callable, queries: int, keys: int, device: str) -> BlockMask:
    return create_block_mask(mask, None, None, queries, keys, device=device)


def compiled(run: Run, device: str) -> Run:
    """Compile `run`; without a GPU return it unchanged, because nothing is timed."""
    if device != "cuda":
        return run
    return torch.compile(run, dynamic=False, fullgraph=True)
