"""FreqFusion against records of the published module in float64, gradients included."""

from typing import Any

import golden
import pytest
import torch
from torch import Tensor

from tessel.blocks.frequency_fusion import (
    FrequencyFusion,
    FrequencyFusionConcat,
    FrequencyFusionPyramid,
    reassemble,
    similarity,
)

FUSIONS: dict[str, dict[str, Any]] = {
    "semi_zero": {},
    "semi_reflect": {"border": "reflect"},
    "resample_zero": {"resample": True, "window": False},
    "resample_reflect": {"resample": True, "window": False, "border": "reflect"},
    "resample_nonorm_zero": {"resample": True, "groups": 8, "norm": False},
    "resample_sim_zero": {"resample": True, "window": False, "direction": "sim"},
    "semi_nocomp_zero": {"refine": False},
    "nosemi_zero": {"semi": False},
    "nohighpass_zero": {"refine": False, "high_pass": False},
    "noresidual_zero": {"residual": False},
}
NAMES = {
    "hr_channel_compressor": "compress_fine", "lr_channel_compressor": "compress_coarse", "content_encoder": "low",
    "content_encoder2": "high", "dysampler": "resample", "direct_scale": "scale", "hr_offset": "fine_offset",
    "hr_direct_scale": "fine_scale", "norm_hr": "norm_fine", "norm_lr": "norm_coarse", "freqfusions": "fusions",
    "alignment": "fusions", "lateral_convs": "lateral", "fpn_convs": "output",
}  # fmt: skip


def our_name(key: str) -> str:
    return ".".join(NAMES.get(part, part) for part in key.split(".") if part != "conv")


def check_outputs(record: dict[str, Any], inputs: list[Any], outputs: list[Tensor], module: torch.nn.Module) -> None:
    """Outputs and gradients equal those of the record."""
    for number, (output, want) in enumerate(zip(outputs, record["outputs"], strict=True)):
        assert list(output.shape) == want["shape"]
        if number == 0:
            values = record.get("logits")
            got = output if values else torch.nn.functional.adaptive_avg_pool2d(output, 2)
            assert golden.relative_error(got, values or record["features"][0]["pooled"]) <= 1e-9
        else:
            assert golden.relative_error(output, want["values"]) <= 1e-9
    sum((out * golden.draw(f"loss{i or ''}", out.shape)).sum() for i, out in enumerate(outputs)).backward()  # type: ignore[union-attr]
    for number, x in enumerate(inputs):
        assert float(x.grad.norm()) == pytest.approx(record["input_grad_norms"][f"input{number}"], rel=1e-9)
    for key, norm in record["grad_norms"].items():
        grad = module.get_parameter(our_name(key)).grad
        assert grad is not None and float(grad.norm()) == pytest.approx(norm, rel=1e-9, abs=1e-10), key


def load(record: dict[str, Any], module: torch.nn.Module) -> list[Any]:
    """Loads the state of the record; its inputs."""
    state = {our_name(key): tensor for key, tensor in golden.published_state(record).items()}
    module.double().load_state_dict(state)
    return [golden.draw(key, shape).requires_grad_() for key, shape in record["input_shapes"].items()]


@pytest.mark.parametrize("name", FUSIONS)
def test_equals_the_record(name):
    record = golden.load(f"modules/freqfusion_{name}")
    fusion = FrequencyFusion(24, 16, compressed=16, **FUSIONS[name])
    inputs = load(record, fusion)
    fine, coarse, kernel = fusion.fuse(*inputs)
    check_outputs(record, inputs, [kernel, fine, coarse], fusion)


def test_pyramid_equals_the_record():
    record = golden.load("modules/freqfusion_fpn_c32_l3")
    pyramid = FrequencyFusionPyramid([16, 24, 32], 32, extra=True, compressed=8)
    inputs = load(record, pyramid)
    check_outputs(record, inputs, pyramid(inputs), pyramid)


def test_concatenation_equals_the_record():
    record = golden.load("modules/freqfusion_concat_c80")
    concat = FrequencyFusionConcat([16, 32, 32])
    inputs = load(record, concat)
    check_outputs(record, inputs, [concat(inputs)], concat)


@pytest.mark.parametrize("border", ["zeros", "reflect"])
def test_reassembly_equals_a_loop_over_pixels(border):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 9, 8, 10, dtype=torch.float64, requires_grad=True)
    y = reassemble(x, weights, 2, border)

    def cell(row: int, column: int) -> Tensor | int:
        if border == "reflect":
            row, column = (size - 1 - abs(size - 1 - abs(i)) for i, size in ((row, 4), (column, 5)))
        return x[:, :, row, column] if 0 <= row < 4 and 0 <= column < 5 else 0

    for i in range(8):
        for j in range(10):
            taps = [(p, q) for p in range(3) for q in range(3)]
            want = sum(weights[:, None, 3 * p + q, i, j] * cell(i // 2 + p - 1, j // 2 + q - 1) for p, q in taps)
            torch.testing.assert_close(y[:, :, i, j], want)
    assert torch.autograd.gradcheck(lambda *args: reassemble(*args, 2, border), (x, weights), fast_mode=True)


def test_similarity_equals_a_loop_over_neighbours():
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    found = similarity(x)
    places = [(p, q) for p in (-2, 0, 2) for q in (-2, 0, 2) if p or q]
    for number, (p, q) in enumerate(places):
        for i in range(5):
            for j in range(4):
                inside = 0 <= i + p < 5 and 0 <= j + q < 4
                other = x[0, :, i + p, j + q] if inside else x.new_zeros(6)
                want = torch.cosine_similarity(x[0, :, i, j], other, dim=0)
                torch.testing.assert_close(found[0, number, i, j], want)


@pytest.mark.parametrize("options", [{}, {"resample": True}, {"semi": False}, {"refine": False}], ids=str)
@pytest.mark.parametrize("sizes", [((1, 1), (1, 1)), ((7, 5), (4, 3)), ((7, 5), (3, 2)), ((6, 4), (6, 4))], ids=str)
def test_maps_of_any_size(options, sizes):
    fusion = FrequencyFusion(8, 12, compressed=8, **options).double()
    fine, coarse = (torch.randn(1, c, *size, dtype=torch.float64) for c, size in zip((8, 12), sizes, strict=True))
    outputs = fusion(fine, coarse)
    assert [tuple(out.shape) for out in outputs] == [(1, 8, *sizes[0]), (1, 12, *sizes[0])]
    assert all(bool(out.isfinite().all()) for out in outputs)
    if sizes == ((6, 4), (6, 4)):
        half = torch.nn.functional.interpolate(coarse, (3, 2), mode="bilinear")
        torch.testing.assert_close(outputs[1], fusion.fuse(fine, half)[1])


def test_odd_maps_are_those_of_the_repeated_border_cut():
    fusion = FrequencyFusion(8, 8, compressed=8).double()
    fine, coarse = torch.randn(1, 8, 7, 5, dtype=torch.float64), torch.randn(1, 8, 4, 3, dtype=torch.float64)
    padded = torch.cat((fine, fine[:, :, -1:]), 2)
    padded = torch.cat((padded, padded[..., -1:]), 3)
    for found, whole in zip(fusion(fine, coarse), fusion.fuse(padded, coarse), strict=False):
        torch.testing.assert_close(found, whole[..., :7, :5])


def test_a_resampler_without_offsets_changes_nothing():
    fusion = FrequencyFusion(8, 8, compressed=8, resample=True).double()
    assert fusion.resample is not None
    for layer in (fusion.resample.offset, fusion.resample.fine_offset):
        torch.nn.init.zeros_(layer.weight)
    x = torch.randn(2, 8, 6, 10, dtype=torch.float64)
    a, b = torch.randn(2, 8, 6, 10, dtype=torch.float64), torch.randn(2, 8, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(fusion.resample(a, b, x), x)
    torch.nn.init.constant_(fusion.resample.offset.bias[:16], 2.0)  # times a gate of 1/2: one coarse cell along x
    for layer in (fusion.resample.scale, fusion.resample.fine_scale):
        torch.nn.init.zeros_(layer.weight)
    torch.testing.assert_close(fusion.resample(a, b, x)[..., :-2], x[..., 2:])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="high_pass=False needs refine=False"):
        FrequencyFusion(8, 8, high_pass=False)
    with pytest.raises(ValueError, match="groups=5 do not divide the 8 channels"):
        FrequencyFusion(8, 8, resample=True, groups=5)
    with pytest.raises(ValueError, match="border='mirror' must be zeros or reflect"):
        FrequencyFusion(8, 8, border="mirror")  # type: ignore[arg-type]


class Pair(torch.nn.Module):
    """A pyramid of two maps, as separate arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = FrequencyFusionPyramid([4, 8], 8, compressed=8)

    def forward(self, fine: Tensor, coarse: Tensor) -> list[Tensor]:
        return self.pyramid([fine, coarse])


@pytest.mark.slow
def test_exports_with_open_sizes():
    module = Pair().eval()
    height, width = (torch.export.Dim(name, min=3, max=256) for name in ("height", "width"))
    rows, columns = (torch.export.Dim(name, min=2, max=256) for name in ("rows", "columns"))
    shapes = ({2: height, 3: width}, {2: rows, 3: columns})
    program = torch.export.export(module, (torch.randn(1, 4, 12, 10), torch.randn(1, 8, 6, 5)), dynamic_shapes=shapes)
    for size, half in (((9, 14), (5, 7)), ((16, 8), (8, 4)), ((7, 7), (3, 3))):
        maps = torch.randn(1, 4, *size), torch.randn(1, 8, *half)
        for found, want in zip(program.module()(*maps), module(*maps), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.large
def test_compiles():
    module = Pair()
    compiled, maps = torch.compile(module), (torch.randn(1, 4, 9, 10), torch.randn(1, 8, 5, 5))
    for found, want in zip(compiled(*maps), module(*maps), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    compiled(*maps)[0].sum().backward()
