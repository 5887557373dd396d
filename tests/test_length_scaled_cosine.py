"""Length-scaled cosine attention and its position bias, against a loop over pairs of positions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import LengthScaledCosine
from tessel.blocks.length_scaled_cosine import LogPositionBias
from tessel.kernels.precision import l2_normalize
from tessel.kernels.tables import cache_tensors, expand_bias


def bins(queries: int, keys: int) -> list[Tensor]:
    """The positions that each of `keys` adaptive pooling bins covers."""
    return [torch.arange(j * queries // keys, math.ceil((j + 1) * queries / keys)) for j in range(keys)]


def coordinate(query: int, key: Tensor, trained_size: int) -> Tensor:
    u = (query - key.double().mean()) / (trained_size - 1) * 8
    return u.sign() * torch.log2(u.abs() + 1) / 3


def bias_by_pairs(position: LogPositionBias, size: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """The bias `[heads, H*W, keys]` in float64, with the MLP evaluated for each pair of positions."""
    vertical, horizontal = (
        [[coordinate(q, key, position.trained_size) for key in bins(n, k)] for q in range(n)]
        for n, k in zip(size, keys, strict=True)
    )
    pairs = [
        torch.stack([vertical[y][i], horizontal[x][j]])
        for y in range(size[0])
        for x in range(size[1])
        for i in range(keys[0])
        for j in range(keys[1])
    ]
    hidden = torch.stack(pairs) @ position.fc1_weight.T + position.fc1_bias
    bias = hidden.relu() @ position.fc2_weight.T + position.fc2_bias
    return bias.T.reshape(len(bias.T), size[0] * size[1], -1)


def resized_by_pairs(position: LogPositionBias, nominal, size, keys) -> Tensor:
    """The bias of the grids `nominal`, resized over the keys to `keys` and then over the queries to `size`."""
    bias = bias_by_pairs(position, *nominal).unflatten(2, nominal[1])
    bias = F.interpolate(bias, size=keys, mode="bilinear", align_corners=False).flatten(2).mT
    return F.interpolate(bias.unflatten(2, nominal[0]), size=size, mode="bilinear", align_corners=False).flatten(2).mT


def dense(position: LogPositionBias, *args) -> Tensor:
    """The bias of `LogPositionBias`, expanded to `[heads, H*W, keys]`."""
    return expand_bias(*position(*args)).permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Fill the parameters with random numbers large enough that each has an effect."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module


def by_pairs(mixer: LengthScaledCosine, x: Tensor, bias: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, as a loop over queries."""
    dim, height, width = x.shape
    tokens = x.flatten(1).T
    q, k, v = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).split(dim, 1)
    out = torch.zeros_like(v)
    for head, columns in enumerate(torch.arange(dim).chunk(mixer.num_heads)):
        scale = torch.log(1 + mixer.temperature[head, 0, 0].exp()) * math.log(height * width)
        for n in range(height * width):
            query = (q[n, columns] / q[n, columns].norm() + mixer.query_embedding[head, 0]) * scale
            logits = [query @ (k[m, columns] / k[m, columns].norm()) for m in range(height * width)]
            out[n, columns] = (torch.stack(logits) + bias[head, n]).softmax(0) @ v[:, columns]
    return (out @ mixer.proj.weight.T + mixer.proj.bias).T.reshape(x.shape)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 3]),
    nominal=st.sampled_from([None, 1, 2, 3]),
)
def test_equals_the_loop_over_pairs(height, width, heads, nominal):
    torch.manual_seed(0)
    mixer = LengthScaledCosine(4 * heads, num_heads=heads, trained_size=3, nominal_size=nominal).double()
    randomize(mixer)
    x, size = torch.randn(2, 4 * heads, height, width, dtype=torch.float64), (height, width)
    with torch.no_grad():
        if nominal is None:
            bias = bias_by_pairs(mixer.position, size, size)
        else:
            bias = resized_by_pairs(mixer.position, ((nominal, nominal), (nominal, nominal)), size, size)
        expected = torch.stack([by_pairs(mixer, image, bias) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), data=st.data())
def test_bias_equals_the_loop_over_pairs(size, data):
    keys = tuple(data.draw(st.integers(1, n)) for n in size)
    position = randomize(LogPositionBias(2, trained_size=5, hidden=8).double())
    with torch.no_grad():
        torch.testing.assert_close(dense(position, size, keys), bias_by_pairs(position, size, keys))


@pytest.mark.parametrize("nominal", [((4, 4), (2, 2)), ((6, 3), (3, 1)), ((7, 9), (3, 4)), ((7, 9), (2, 2))], ids=str)
def test_resized_bias_equals_the_loop_over_pairs(nominal):
    position = randomize(LogPositionBias(2, trained_size=5, hidden=8).double())
    with torch.no_grad():
        expected = resized_by_pairs(position, nominal, (7, 9), (3, 4))
        torch.testing.assert_close(dense(position, (7, 9), (3, 4), nominal), expected)


@pytest.mark.parametrize(("size", "reduction"), [(56, 8), (28, 4), (14, 2), (7, 1)])
def test_each_distance_is_evaluated_once(size, reduction):
    grids = (size, size), (size // reduction, size // reduction)
    table, rows, columns = LogPositionBias(1, trained_size=size, hidden=2)(*grids)
    assert table.shape == (1, 2 * size - reduction, 2 * size - reduction)
    assert rows.unique().tolist() == columns.unique().tolist() == list(range(2 * size - reduction))


def test_hidden_layer_in_slices_gives_the_same_bias(monkeypatch):
    position = randomize(LogPositionBias(2, trained_size=5, hidden=8).double())
    whole = position((7, 9), (3, 4))[0]
    monkeypatch.setattr("tessel.blocks.length_scaled_cosine._SLICE", 200)
    torch.testing.assert_close(position((7, 9), (3, 4))[0], whole)


def test_gradcheck():
    mixer = LengthScaledCosine(4, num_heads=2, trained_size=3).double()
    mixer.position = LogPositionBias(2, trained_size=3, hidden=4).double()
    randomize(mixer)
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_l2_normalize_equals_torch_normalize():
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    x[1] = 0
    x[2] *= 1e-13
    x.requires_grad_()
    expected = F.normalize(x, dim=1, eps=1e-12)
    torch.testing.assert_close(l2_normalize(x, dim=1), expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (l2_normalize(x, dim=1), expected)]
    torch.testing.assert_close(*grads)
    assert l2_normalize(x.detach().bfloat16(), dim=1).dtype == torch.float32


def test_cached_tensors_work_in_every_mode():
    computed = []

    @cache_tensors
    def table(n: int) -> tuple[Tensor, ...]:
        computed.append(n)
        return (torch.ones(n),)

    with torch.inference_mode():
        (first,) = table(3)
    assert not first.is_inference() and table(3)[0] is first and computed == [3]
    with torch._subclasses.FakeTensorMode():
        assert type(table(3)[0]) is not Tensor
        table(4)
    assert type(table(4)[0]) is Tensor


def test_mixer_still_runs_after_a_fake_tensor_mode():
    mixer = LengthScaledCosine(4, num_heads=2, trained_size=3)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        mixer(mode.from_tensor(torch.randn(1, 4, 5, 11)))
    assert mixer(torch.randn(1, 4, 5, 11)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=16.*num_heads=3"),
        ({"trained_size": 1}, "trained_size=1"),
        ({"nominal_size": 0}, "nominal_size=0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LengthScaledCosine(16, **{"num_heads": 2, "trained_size": 7, **arguments})
