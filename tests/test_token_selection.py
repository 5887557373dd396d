"""The blocks of a selection against loops over images and pixels that follow the released code step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.blocks import MergeSelection, ScoreTokens, Selection, SelectTokens
from tessel.blocks.token_selection import ScoredAttention, SequenceBlock

DIM = 6


def make(kind, **options):
    return kind(DIM, num_heads=2, mlp_ratio=2.0, **options).double()


def draw(height: int, width: int, batch: int = 2) -> Selection:
    scores = torch.rand(batch, height * width, dtype=torch.float64)
    image, token = torch.randn(batch, DIM, height, width), torch.randn(batch, DIM)
    return Selection(image.double(), token.double(), scores)


def attention(mixer: ScoredAttention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Output and first row of the attention for one sequence `[T, C]`, with the matrix of all probabilities."""
    q, k, v = mixer.qkv(tokens).chunk(3, -1)
    heads = torch.arange(DIM).chunk(mixer.num_heads)
    matrices = [(q[:, c] @ k[:, c].T / len(c) ** 0.5).softmax(-1) for c in heads]
    mixed = torch.cat([matrix @ v[:, c] for matrix, c in zip(matrices, heads, strict=True)], -1)
    return mixer.proj(mixed), torch.stack([matrix[0] for matrix in matrices]).mean(0)


def sequence(block: SequenceBlock, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mixed, row = attention(block.mixer, block.norm1(tokens))
    changed = block.mlp(block.norm2(tokens + mixed))
    return tokens + mixed + changed, mixed + changed, row


def selected(block: SelectTokens, image: Tensor, token: Tensor, score: Tensor) -> Selection:
    """`block` for one image, pixel by pixel."""
    image = block.cpe(image[None])[0]
    pixels, count = image.flatten(1).T, image[0].numel()
    ranked = sorted(range(count), key=lambda j: -score[j].item())
    kept, rest = ranked[: count // 2], ranked[count // 2 :]
    mean = sum(score[j] * pixels[j] for j in rest) / sum(score[j] for j in rest)
    tokens, change, row = sequence(block.sequence, torch.stack([token, *(pixels[j] for j in kept), mean]))
    out, scores = pixels.clone(), score.clone()
    for place, j in enumerate(ranked):
        out[j] = tokens[1 + place] if j in kept else pixels[j] + change[-1]
        if j in kept or count <= 2:
            scores[j] = 0.5 * score[j] + 0.5 * row[1 + place]
    return Selection(out.T.reshape(image.shape), tokens[0], scores)


def compare(got: Selection, images: list[Selection]) -> None:
    for found, expected in zip(got, (torch.stack(parts) for parts in zip(*images, strict=True)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(height=st.integers(1, 5), width=st.integers(1, 5))
def test_selected_pixels_equal_the_loop(height, width):
    torch.manual_seed(0)
    block, state = make(SelectTokens), draw(height, width)
    with torch.no_grad():
        compare(block(state), [selected(block, *parts) for parts in zip(*state, strict=True)])


@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
def test_the_first_block_scores_all_pixels(size):
    block, image = make(ScoreTokens), draw(*size).map
    torch.nn.init.normal_(block.token)
    with torch.no_grad():
        expected = []
        for one in block.cpe(image):
            tokens, _, row = sequence(block.sequence, torch.cat([block.token[0], one.flatten(1).T]))
            expected.append(Selection(tokens[1:].T.reshape(one.shape), tokens[0], row[1:]))
        compare(block(image), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 3), (4, 5)])
def test_gradcheck(size):
    """Scores pass gradients to the attention of earlier blocks."""
    first, block = make(ScoreTokens), make(SelectTokens)
    image = draw(*size, batch=1).map.requires_grad_()
    parameters = (*first.parameters(), *block.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: tuple(block(first(x))), (image, *parameters), fast_mode=True)


def test_scores_are_pooled_and_keep_their_sum():
    merge = MergeSelection(DIM, 4, down=torch.nn.AvgPool2d(2)).double()
    state = draw(5, 7)
    merged = merge(state)
    grid = state.score.view(2, 5, 7)
    cells = torch.stack([grid[:, i : i + 2, j : j + 2].sum((1, 2)) for i in (0, 2) for j in (0, 2, 4)], 1)
    torch.testing.assert_close(merged.score, cells * (state.score.sum(1) / cells.sum(1))[:, None])
    torch.testing.assert_close(merged.token, merge.token(state.token))


def test_drop_path_does_not_reach_what_unselected_pixels_get():
    block, state = make(SelectTokens, drop_path=1 - 1e-9), draw(2, 2)
    rest = state.score.argsort(1)[:, :2, None].expand(-1, -1, DIM)
    for parameter in block.cpe.parameters():
        torch.nn.init.zeros_(parameter)
    before = state.map.permute(0, 2, 3, 1).flatten(1, 2)
    changed = block.train()(state).map.permute(0, 2, 3, 1).flatten(1, 2) - before
    assert changed.gather(1, rest).abs().min() > 0
    assert not changed.scatter(1, rest, 0.0).any(), "drop path removes both branches of selected pixels"


@pytest.mark.parametrize("heads", [0, 4])
def test_constructor_errors(heads):
    with pytest.raises(ValueError, match=f"dim=6.*num_heads={heads}"):
        SelectTokens(6, num_heads=heads, mlp_ratio=2.0)
