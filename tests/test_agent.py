"""Agent attention against loops over heads, agents and positions, and the published dense-prediction backbone."""

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel import zoo
from tessel.blocks import Agent, Windows
from tessel.blocks.agent import AgentBias
from tessel.zoo.dense import DenseBackbone


def resized(values: Tensor, size: int) -> Tensor:
    """Linear resizing along the last axis, position by position; pixel centers lie at i + 1/2."""
    old = values.shape[-1]
    out = values.new_zeros(*values.shape[:-1], size)
    for i in range(size):
        position = min(max((i + 0.5) * old / size - 0.5, 0), old - 1)
        left = int(position)
        right, part = min(left + 1, old - 1), position - left
        out[..., i] = (1 - part) * values[..., left] + part * values[..., right]
    return out


def bias_by_loops(bias: AgentBias, size: tuple[int, int], side: int) -> Tensor:
    """`[heads, agents, (1 +) H*W]`."""
    old = bias.side
    table = resized(resized(bias.table, size[1]).transpose(2, 3), size[0]).transpose(2, 3)
    total = table + resized(bias.rows, size[0])[..., None] + resized(bias.columns, size[1])[:, :, None]
    total = total.flatten(2)
    if bias.token is not None:
        total = torch.cat([bias.token, total], 2)
    on_grid = total.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    on_grid = resized(resized(on_grid, side).transpose(2, 3), side).transpose(2, 3)
    return on_grid.flatten(2).transpose(1, 2)


def by_loops(mixer: Agent, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The mixer for one image, tokens `[(1 +) H*W, C]`."""
    (height, width), side = size, mixer.agent_grid[0]
    first = len(tokens) - height * width
    q, k, v = mixer.qkv(tokens).chunk(3, -1)
    on_map = q[first:].unflatten(0, size)
    agents = []
    for i in range(side):
        for j in range(side):
            rows = slice(i * height // side, -(-(i + 1) * height // side))
            columns = slice(j * width // side, -(-(j + 1) * width // side))
            agents.append(on_map[rows, columns].mean((0, 1)))
    agents = torch.stack(agents)
    gather, read = (bias_by_loops(b, size, side) for b in (mixer.gather_bias, mixer.read_bias))
    y = torch.zeros_like(tokens)
    for h, c in enumerate(torch.arange(tokens.shape[1]).chunk(mixer.num_heads)):
        scale = len(c) ** -0.5
        gathered = torch.stack(
            [
                (((k[:, c] * agent[c]).sum(1) * scale + gather[h, a]).softmax(0)[:, None] * v[:, c]).sum(0)
                for a, agent in enumerate(agents)
            ]
        )
        for i in range(len(tokens)):
            weights = ((agents[:, c] * q[i, c]).sum(1) * scale + read[h, :, i]).softmax(0)
            y[i, c] = weights @ gathered
    values = F.pad(v[first:].unflatten(0, size), (0, 0, 1, 1, 1, 1))
    kernel = mixer.local.weight[:, 0].permute(1, 2, 0)
    for i in range(height):
        for j in range(width):
            y[first + i * width + j] += (values[i : i + 3, j : j + 3] * kernel).sum((0, 1)) + mixer.local.bias
    return mixer.proj(y)


def perturbed(**options) -> Agent:
    mixer = Agent(6, num_heads=2, **options).double()
    for parameter in (*mixer.gather_bias.parameters(), *mixer.read_bias.parameters()):
        torch.nn.init.normal_(parameter)
    return mixer


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    agents=st.sampled_from([1, 4, 9]),
    trained_size=st.integers(1, 8),
    pool_side=st.sampled_from([None, 1, 3, 4]),
    class_token=st.booleans(),
)
def test_equals_the_loop(size, agents, trained_size, pool_side, class_token):
    torch.manual_seed(0)
    mixer = perturbed(agents=agents, trained_size=trained_size, pool_side=pool_side, class_token=class_token)
    x = torch.randn(2, class_token + size[0] * size[1], 6, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image, size) for image in x])
        if class_token:
            got = mixer(x[:, None].permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)[:, 0]
        else:
            got = mixer(x.unflatten(1, size).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "pool_side", "class_token"), [((3, 4), None, False), ((1, 1), 3, False), ((2, 3), None, True)]
)
def test_gradcheck(size, pool_side, class_token):
    mixer = perturbed(agents=4, trained_size=2, pool_side=pool_side, class_token=class_token)
    shape, size = ((1, 6, 1, 1 + size[0] * size[1]), size) if class_token else ((1, 6, *size), None)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x, size), (x, *mixer.parameters()), fast_mode=True)


def test_biases_are_not_changed_at_the_trained_size():
    bias = AgentBias(2, agents=9, trained_size=7).double()
    expected = bias.table + bias.rows[..., None] + bias.columns[:, :, None]
    torch.testing.assert_close(bias((7, 7), (3, 3)), expected.flatten(2), rtol=0, atol=1e-16)


def test_a_large_map_in_bfloat16_has_the_bias_of_single_precision():
    torch.manual_seed(0)
    bias = AgentBias(1, agents=4, trained_size=7)
    expected = bias((300, 3), (2, 2))
    torch.testing.assert_close(bias.bfloat16()((300, 3), (2, 2)).float(), expected, rtol=0, atol=5e-4)


def test_each_window_is_an_image_of_its_own():
    mixer = perturbed(agents=4, trained_size=4)
    windows = Windows(mixer, window=4)
    x = torch.randn(2, 6, 6, 9, dtype=torch.float64)
    padded = F.pad(x, (0, 3, 0, 2))
    with torch.no_grad():
        y = windows(x)
        for i in range(0, 6, 4):
            for j in range(0, 9, 4):
                alone = mixer(padded[:, :, i : i + 4, j : j + 4])
                part = y[:, :, i : i + 4, j : j + 4]
                torch.testing.assert_close(part, alone[:, :, : part.shape[2], : part.shape[3]], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="window=0"):
        Windows(mixer, window=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 4}, "dim=6.*num_heads=4"),
        ({"agents": 10}, "agents=10.*square"),
        ({"agents": 0}, "agents=0"),
        ({"trained_size": 0}, "trained_size=0"),
        ({"pool_side": 0}, "pool_side=0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Agent(6, **{"num_heads": 2, "trained_size": 7, **arguments})


def test_the_published_dense_backbone():
    """Agents on grids of 12 to 28 pixels a side, biases and position embeddings for a map that is not square."""
    record = golden.load("dense/agent_pvt_tiny_224x288")
    model = DenseBackbone("agent_pvt_tiny").double().eval()
    assert model.load_published(golden.published_state(record)) == {}
    x = golden.draw("input", record["input_shape"]).requires_grad_()
    maps = model(x)
    logits = torch.cat([m.mean((2, 3)) for m in maps], 1)
    found = golden.errors(record, logits=logits, features=maps)
    (logits * golden.draw("loss", logits.shape)).sum().backward()
    grads = {key: p.grad for key, p in model.body.named_parameters()}
    whole = timm.create_model("agent_pvt_tiny").state_dict()
    head = {key: whole[key] for key in ("head.fc.weight", "head.fc.bias")}
    published = {k: g for k, g in zoo.to_published("agent_pvt_tiny", grads | head).items() if not k.startswith("head.")}
    assert x.grad is not None
    found |= golden.gradient_errors(record, input_grad=x.grad, grads=published)
    assert max(found.values()) <= 1e-9, {k: v for k, v in found.items() if v > 1e-9}


def test_the_class_token_models_are_not_for_dense_prediction():
    with pytest.raises(ValueError, match="agent_deit_atto has feature maps of strides 16, 16, 16, 16"):
        DenseBackbone("agent_deit_atto")
