"""Aggregated attention against a loop over heads, queries and their keys."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_length_scaled_cosine import bias_by_pairs, bins, randomize, resized_by_pairs
from torch import Tensor, nn

from tessel.blocks import Aggregated, ConvGlu
from tessel.blocks.length_scaled_cosine import LogPositionBias
from tessel.blocks.pooling import bin_weights


def pooled_tokens(mixer: Aggregated, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens of the pooled map of one image `[C, H, W]`, as a loop over the bins."""
    features = torch.einsum("oc,chw->ohw", mixer.sr.weight[:, :, 0, 0], x) + mixer.sr.bias[:, None, None]
    features = nn.functional.gelu(features)
    rows, columns = (bins(n, k) for n, k in zip(x.shape[1:], grid, strict=True))
    means = [features[:, r][:, :, c].mean((1, 2)) for r in rows for c in columns]
    return nn.functional.layer_norm(torch.stack(means), x.shape[:1], mixer.norm.weight, mixer.norm.bias, eps=1e-5)


def by_loops(mixer: Aggregated, x: Tensor, grid: tuple[int, int], bias: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, given its pooled grid and the bias of the pooled keys `[heads, H*W, P]`."""
    dim, height, width = x.shape
    reach = mixer.window // 2
    q, k, v = (torch.einsum("oc,chw->hwo", mixer.qkv.weight, x) + mixer.qkv.bias).split(dim, 2)
    _, k_p, v_p = (pooled_tokens(mixer, x, grid) @ mixer.qkv.weight.T + mixer.qkv.bias).split(dim, 1)
    out = torch.zeros_like(v)
    for head, c in enumerate(torch.arange(dim).chunk(mixer.num_heads)):
        softplus = torch.log(1 + mixer.temperature[head, 0, 0].exp())
        for y in range(height):
            for z in range(width):
                window = [(i, j) for i in range(y - reach, y + reach + 1) for j in range(z - reach, z + reach + 1)]
                inside = [o for o, (i, j) in enumerate(window) if 0 <= i < height and 0 <= j < width]
                plain = q[y, z, c] / q[y, z, c].norm()
                length = torch.tensor(len(inside) + len(k_p), dtype=x.dtype).log()
                query = (plain + mixer.query_embedding[head, 0]) * softplus * length
                keys = [k[window[o]][c] for o in inside] + list(k_p[:, c])
                added = torch.cat([mixer.relative_pos_bias_local[head, inside], bias[head, y * width + z]])
                weights = (torch.stack([query @ (key / key.norm()) for key in keys]) + added).softmax(0)
                filters = plain @ mixer.learnable_tokens[head] + mixer.learnable_bias[head, 0]
                weights = weights + torch.cat([filters[inside], torch.zeros(len(k_p), dtype=x.dtype)])
                out[y, z, c] = weights @ torch.stack([v[window[o]][c] for o in inside] + list(v_p[:, c]))
    out = torch.einsum("oc,hwc->ohw", mixer.proj.weight, out)
    return out + mixer.proj.bias[:, None, None]


def make(dim: int, **kwargs) -> Aggregated:
    mixer = Aggregated(dim, **{"num_heads": 2, "reduction": 2, "trained_size": 3, **kwargs}).double()
    randomize(mixer)
    return mixer


@settings(deadline=None, max_examples=25)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    heads=st.sampled_from([1, 2]),
    window=st.sampled_from([1, 3, 5]),
    reduction=st.integers(1, 4),
    pool_size=st.sampled_from([None, None, 1, 3]),
    nominal=st.sampled_from([None, None, 2, 5]),
)
def test_equals_the_loop(size, heads, window, reduction, pool_size, nominal):
    torch.manual_seed(0)
    options = {"window": window, "reduction": reduction, "pool_size": pool_size, "nominal_size": nominal}
    mixer = make(3 * heads, num_heads=heads, **options)

    def grid(n: int) -> int:
        return max(1, n // reduction) if pool_size is None else min(n, pool_size)

    keys = (grid(size[0]), grid(size[1]))
    x = torch.randn(1, 3 * heads, *size, dtype=torch.float64)
    with torch.no_grad():
        if nominal is None:
            bias = bias_by_pairs(mixer.position, size, keys)
        else:
            bias = resized_by_pairs(mixer.position, ((nominal,) * 2, (grid(nominal),) * 2), size, keys)
        torch.testing.assert_close(mixer(x)[0], by_loops(mixer, x[0], keys, bias), rtol=1e-9, atol=1e-9)


def test_row_groups_do_not_change_output_and_gradients(monkeypatch):
    mixer = make(6, reduction=2)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        y = mixer(x)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()])]

    unsplit = run()
    monkeypatch.setattr("tessel.kernels.aggregated.reference.CHUNK_WEIGHTS", 2 * 12 * 7 * 2)  # two rows at a time
    for got, want in zip(run(), unsplit, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_shifts_at_once_do_not_change_output_and_gradients(monkeypatch, window):
    """What runs on a GPU, where launches count, and what runs on the CPU."""
    mixer = make(6, reduction=2, window=window)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        y = mixer(x)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()])]

    one_by_one = run()
    monkeypatch.setattr("tessel.kernels.aggregated.reference.working_bytes", lambda device, cpu: 1 << 30)
    for got, want in zip(run(), one_by_one, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "reduction"), [((4, 4), 2), ((3, 5), 2), ((1, 1), 1)])
def test_gradcheck(size, reduction):
    mixer = make(4, reduction=reduction)
    mixer.position = LogPositionBias(2, trained_size=3, hidden=4).double()
    randomize(mixer.position)
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_zero_input_has_finite_gradients():
    mixer = make(4)
    nn.init.zeros_(mixer.qkv.bias)
    x = torch.zeros(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(mixer(x).sum(), [x, *mixer.parameters()])
    assert all(g.isfinite().all() for g in grads)


def test_bias_tables_work_in_every_mode_and_dtype():
    mixer = Aggregated(8, num_heads=2, reduction=2, trained_size=7)
    x = torch.randn(1, 8, 6, 11)
    with torch.inference_mode():
        expected = mixer(x)
    mixer(x).sum().backward()
    torch.testing.assert_close(mixer.double()(x.double()).float(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixer.float()(x).float(), expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(mixer.bfloat16()(x.bfloat16()).float(), expected, rtol=3e-2, atol=3e-2)


@settings(deadline=None, max_examples=30)
@given(side=st.integers(1, 40), bins=st.integers(1, 12))
def test_bins_equal_adaptive_pooling(side, bins):
    x = torch.randn(1, 2, side, dtype=torch.float64)
    pooled = x @ bin_weights(side, bins, x).transpose(0, 1)
    torch.testing.assert_close(pooled, nn.functional.adaptive_avg_pool1d(x, bins), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_exported_program_takes_any_batch():
    mixer = Aggregated(8, num_heads=2, reduction=2, trained_size=7).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(mixer, (torch.randn(2, 8, 6, 4),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 8, 6, 4)
    torch.testing.assert_close(program.module()(x), mixer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=16.*num_heads=3"),
        ({"window": 4}, "window=4.*odd"),
        ({"window": -1}, "window=-1"),
        ({"reduction": 0}, "reduction=0"),
        ({"pool_size": 0}, "pool_size=0"),
        ({"nominal_size": 0}, "nominal_size=0"),
        ({"trained_size": 1}, "trained_size=1"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Aggregated(16, **{"num_heads": 2, "reduction": 2, "trained_size": 7, **arguments})


@pytest.fixture(scope="module")
def transnext():
    return timm.create_model("transnext_atto", num_classes=10).double().eval()


def variant(transnext: nn.Module, **options) -> nn.Module:
    """A model with the same weights and other options."""
    model = timm.create_model("transnext_atto", num_classes=10, **options).double().eval()
    model.load_state_dict(transnext.state_dict())
    return model


def test_interpolated_bias_is_exact_at_img_size(transnext):
    x, model = torch.randn(1, 3, 96, 96, dtype=torch.float64), variant(transnext, img_size=96)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), transnext(x))
        other = torch.randn(1, 3, 97, 131, dtype=torch.float64)
        assert not torch.allclose(model(other), transnext(other), rtol=1e-7, atol=0)


def test_model_options_reach_the_mixers(transnext):
    x = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    with torch.inference_mode():
        y = transnext(x)
        # at this size, the reductions also give a pooled grid of 4 x 4
        torch.testing.assert_close(variant(transnext, fixed_pool_size=4)(x), y)
        for options in ({"fixed_pool_size": 3}, {"pretrain_size": 256}, {"img_size": 224}):
            assert not torch.allclose(variant(transnext, **options)(x), y, rtol=1e-7, atol=0), options


def test_no_weight_decay_equals_the_published_list(transnext):
    published = {"temperature", "query_embedding", "relative_pos_bias_local", "fc1_weight", "fc2_weight"}
    names = {name.rpartition(".")[2] for name in transnext.no_weight_decay()}
    assert names == published
    decayed = {"learnable_tokens", "learnable_bias"}
    assert decayed <= {name.rpartition(".")[2] for name, _ in transnext.named_parameters()}


def test_recomputed_parts_do_not_change_output_and_gradients(monkeypatch):
    """Softmax, position bias and gate, as in dense prediction; the backward pass keeps less for them."""
    block = nn.Sequential(make(6, reduction=1), ConvGlu(6, ratio=8)).double()
    x = torch.randn(2, 6, 16, 16, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[int, list[Tensor]]:
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = block(x)
            size = sum(kept.values())
        return size, [y, *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])]

    whole, kept = run()
    monkeypatch.setattr("tessel.kernels.aggregated.reference.CHUNK_WEIGHTS", 2 * 256 * 16 * 4)  # four rows at a time
    monkeypatch.setattr("tessel.blocks.length_scaled_cosine._SLICE", 1 << 16)
    monkeypatch.setattr("tessel.blocks.mlp.RECOMPUTE_BYTES", 0)
    less, recomputed = run()
    assert less < 0.5 * whole
    for got, want in zip(recomputed, kept, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_compiler_gets_one_graph_of_plain_operations(monkeypatch):
    """Without operators of this package, and without parts that are computed again: it decides what to keep."""
    monkeypatch.setattr("tessel.kernels.aggregated.reference.CHUNK_WEIGHTS", 2 * 256 * 16 * 4)
    block = nn.Sequential(make(6, reduction=1), ConvGlu(6, ratio=8)).double()
    x, targets = torch.randn(2, 6, 16, 16, dtype=torch.float64), []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    assert len(targets) > 50 and not any("tessel" in target or "checkpoint" in target for target in targets)
