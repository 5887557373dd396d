"""Shifted window attention against a loop over windows, and against timm's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from tessel.blocks import ShiftedWindow
from tessel.blocks import shifted_window as module
from tessel.export import export


def by_loops(mixer: ShiftedWindow, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`: windows of pixels as they lie in the image, before any shift."""
    dim, height, width = x.shape
    side = mixer.window
    shift = mixer.shift if min(height, width) > side else 0
    padded = F.pad(x, (0, -width % side, 0, -height % side))
    rows, columns = padded.shape[1:]
    q, k, v = mixer.qkv(padded.permute(1, 2, 0)).chunk(3, -1)
    y = torch.zeros(rows, columns, dim, dtype=x.dtype)
    for i in range(0, rows, side):
        for j in range(0, columns, side):
            # of each pixel of the window: its place in the window and in the image, and the side it was moved from
            cells = [(a, b, i + a + shift, j + b + shift) for a in range(side) for b in range(side)]
            for a, b, row, column in cells:
                near = [
                    (c, d, r % rows, s % columns)
                    for c, d, r, s in cells
                    if (r >= rows) == (row >= rows) and (s >= columns) == (column >= columns)
                ]
                for h, c in enumerate(torch.arange(dim).chunk(mixer.num_heads)):
                    query = q[row % rows, column % columns, c]
                    entries = [(a - e + side - 1) * (2 * side - 1) + b - f + side - 1 for e, f, _, _ in near]
                    keys, values = (torch.stack([t[r, s, c] for _, _, r, s in near]) for t in (k, v))
                    weights = (keys @ query / len(c) ** 0.5 + mixer.bias_table[entries, h]).softmax(0)
                    y[row % rows, column % columns, c] = weights @ values
    return mixer.proj(y)[:height, :width].permute(2, 0, 1)


@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window_shift=st.sampled_from([(1, 0), (2, 1), (3, 1), (3, 2), (4, 0)]),
)
def test_equals_the_loop(size, window_shift):
    torch.manual_seed(0)
    window, shift = window_shift
    mixer = ShiftedWindow(4, num_heads=2, window=window, shift=shift).double()
    torch.nn.init.normal_(mixer.bias_table)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], by_loops(mixer, x[0]), rtol=1e-10, atol=1e-10)


def test_equals_timms_block():
    block = SwinTransformerBlock(8, (12, 16), num_heads=2, window_size=4, shift_size=2).double().eval()
    mixer = ShiftedWindow(8, num_heads=2, window=4, shift=2).double()
    state = block.attn.state_dict()
    mixer.load_state_dict(
        {
            **{k: state[k] for k in state if k.startswith(("qkv", "proj"))},
            "bias_table": state["relative_position_bias_table"],
        }
    )
    x = torch.randn(2, 12, 16, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            mixer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), block._attn(x), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize(("size", "shift"), [((7, 8), 0), ((7, 8), 2), ((9, 12), 1), ((3, 9), 1)])
def test_in_place_where_the_kernels_run(monkeypatch, size, shift):
    """The form that the kernels take gives the same, gradients included."""
    mixer = ShiftedWindow(16, num_heads=2, window=4, shift=shift).double()
    torch.nn.init.normal_(mixer.bias_table)
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    tensors = [x, *mixer.parameters()]
    y = mixer(x)
    want = y, *torch.autograd.grad(y.square().sum(), tensors)
    monkeypatch.setattr(module, "window_kernels_run", lambda *_, **__: True)
    y = mixer(x)
    torch.testing.assert_close((y, *torch.autograd.grad(y.square().sum(), tensors)), want, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    mixer = ShiftedWindow(4, num_heads=2, window=2, shift=1).double()
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_exported_programs_shift_only_large_maps(tmp_path):
    mixer = ShiftedWindow(16, num_heads=2, window=4, shift=2).eval()
    report = export(mixer, tmp_path / "model", "torch-export", example=torch.randn(2, 16, 3, 4))
    sizes = {shape[2:] for shape in report.errors}
    assert (3, 4) in sizes and max(sizes) > (35, 22) and {shape[0] for shape in report.errors} == {1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim=4.*num_heads=3"),
        ({"window": 0}, "window=0"),
        ({"window": 2, "shift": 2}, "shift=2.*0..1"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShiftedWindow(4, **{"num_heads": 2, **arguments})
