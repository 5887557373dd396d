"""PEM against records of the published modules in float64, and as a decode head."""

import re
from typing import Any

import golden
import pytest
import torch
from torch import Tensor, nn

from tessel.blocks import PrototypeAttention
from tessel.train.errors import UserError
from tessel.train.heads.pem import PemDecoder, PemPixelDecoder, resized
from tessel.train.recipe.schema import Dense, Model
from tessel.train.tasks.segment.model import build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

ATTENTION = {
    "alpha": "scale", "feature_proj.to_query_3x3": "depthwise", "feature_proj.bn": "norm_pixels",
    "feature_proj.out": "pixels", "query_proj.0": "norm_query", "query_proj.1": "query", "proj": "product",
    "final": "proj",
}  # fmt: skip
DECODER = {
    "self_attn.": "attention.", "transformer_self_attention_layers.N.norm.": "layers.N.norm1.",
    "transformer_self_attention_layers.": "layers.", "transformer_ffn_layers.N.norm.": "layers.N.norm2.",
    "transformer_ffn_layers.N.linear1.": "layers.N.mlp.0.", "transformer_ffn_layers.N.linear2.": "layers.N.mlp.2.",
    "transformer_cross_attention_layers.N.": "layers.N.cross.", "decoder_norm": "norm", "query_feat": "query",
    "query_embed": "query_position", "level_embed.weight": "level_embed", "input_proj": "inputs",
    "class_embed": "classes", "mask_embed.layers.0": "mask.0", "mask_embed.layers.1": "mask.2",
    "mask_embed.layers.2": "mask.4",
}  # fmt: skip
PIXELS = {
    "in_projections": "inputs", "conv_avg": "context", "out.": "output.", ".mlp.0.mlp.": ".mlp.",
    "dcn_offset": "offset", "dcn_bn": "norm", ".dcn.": ".", "up_sample": "up", "up_bn": "up_norm", ".conv.": ".0.",
}  # fmt: skip


def attention_name(key: str) -> str:
    for published, ours in ATTENTION.items():
        if key == published or key.startswith(f"{published}."):
            return ours + key[len(published) :]
    raise KeyError(key)


def decoder_name(key: str) -> str:
    if found := re.match(r"transformer_cross_attention_layers\.(\d+)\.", key):
        return f"layers.{found[1]}.cross.{attention_name(key[found.end() :])}"
    number = (re.findall(r"_layers\.(\d+)\.", key) or ["N"])[0]
    for published, ours in DECODER.items():
        key = key.replace(published.replace("N", number), ours.replace("N", number))
    return key


def pixels_name(key: str) -> str:
    # ours are counted from fine to coarse
    key = re.sub(r"^dcn\.(\d)", lambda found: f"ups.{2 - int(found[1])}", key)
    key = re.sub(r"^csm\.(\d)", lambda found: f"gates.{3 - int(found[1])}", key)
    for published, ours in PIXELS.items():
        key = key.replace(published, ours)
    if re.match(r"(inputs\.\d|context|output)\.bn", key):
        key = key.replace(".bn.", ".1.")
    return key


def load(name: str, module: nn.Module, rename) -> tuple[dict[str, Any], list[Any]]:
    """The record, whose state the module gets, and its inputs."""
    record = golden.load(f"modules/{name}")
    state = {rename(key): tensor for key, tensor in golden.published_state(record).items()}
    own = module.double().eval().state_dict()
    loaded = module.load_state_dict(
        {key: tensor.reshape(own[key].shape) for key, tensor in state.items()}, strict=False
    )
    assert not loaded.unexpected_keys and all("num_batches" in key for key in loaded.missing_keys)
    return record, [golden.draw(key, shape).requires_grad_() for key, shape in record["input_shapes"].items()]


def check(record, module, rename, inputs: list[Any], outputs: list[Tensor]) -> None:
    for number, (output, want) in enumerate(zip(outputs, record["outputs"], strict=True)):
        assert list(output.shape) == want["shape"]
        values = want.get("values") if number else record.get("logits")
        pooled = want.get("pooled") if number else (record.get("features") or [{}])[0].get("pooled")
        got = output if values else torch.nn.functional.adaptive_avg_pool2d(output, 2)
        assert golden.relative_error(got, values or pooled) <= 1e-9
    losses = [(out * golden.draw(f"loss{i or ''}", out.shape)).sum() for i, out in enumerate(outputs)]
    torch.stack(losses).sum().backward()
    for number, x in enumerate(inputs):
        norm = record["input_grad_norms"][f"input{number}"]
        assert (0.0 if x.grad is None else float(x.grad.norm())) == pytest.approx(norm, rel=1e-9)
    for key, norm in record["grad_norms"].items():
        grad = module.get_parameter(rename(key)).grad
        assert (0.0 if grad is None else float(grad.norm())) == pytest.approx(norm, rel=1e-9, abs=1e-10), key


@pytest.mark.parametrize("case", ["", "_allblocked", "_oneblocked"])
def test_attention_equals_the_record(case):
    module = PrototypeAttention(32, num_heads=4, rescue="image")
    record, inputs = load(f"pem_ca_c32{case}", module, attention_name)
    if case:
        query, x, position, place = inputs
        mask = torch.ones(2, 5, 6, 7, dtype=torch.float64)
        mask[:, slice(None) if case == "_allblocked" else 2] = -1
    else:
        query, x, mask, position, place = inputs
        mask = mask - 0.6
    y = module(query.transpose(0, 1), x, mask, position=position, query_position=place.transpose(0, 1))
    check(record, module, attention_name, inputs, [y.transpose(0, 1)])


def test_decoder_equals_the_record():
    decoder = PemDecoder(32, dim=32, queries=6, heads=4, hidden=48, layers=3, mask_dim=16, rescue="image")
    decoder.classes = nn.Linear(32, 8)
    record, inputs = load("pem_decoder_c32", decoder, decoder_name)
    found = decoder(multi_scale_features=inputs[:3], mask_features=inputs[3])
    logits = [decoder.classes(state.transpose(0, 1)) for state in found.intermediate_hidden_states]
    outputs = [logits[-1], found.masks_queries_logits[-1][:, :2], *logits[:-1]]
    check(record, decoder, decoder_name, inputs, outputs)


def test_pixel_decoder_equals_the_record():
    pixels = PemPixelDecoder([8, 12, 16, 24], dim=16, mask_dim=12)
    record, inputs = load("pem_pixel_decoder_c16", pixels, pixels_name)
    found = pixels(inputs)
    check(record, pixels, pixels_name, inputs, [found.mask_features, *found.multi_scale_features])


def test_choice_equals_a_loop_over_queries():
    torch.manual_seed(0)
    module = PrototypeAttention(8, num_heads=2).double()
    query, pixels = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 12, 8, dtype=torch.float64)
    mask = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    mask[0, 1] = -1
    found = module.choose(query, pixels, mask)
    for b in range(2):
        for head in range(2):
            for q in range(3):
                allowed = [n for n in range(12) if mask[b, q].flatten()[n] >= 0] or range(12)
                part = slice(4 * head, 4 * head + 4)
                want = max(allowed, key=lambda n: float(query[b, q, part] @ pixels[b, n, part]))
                assert int(found[b, head, q]) == want


def test_a_query_without_pixels():
    """Ours takes any pixel; the published one takes the first beside queries that have some."""
    query, pixels = torch.randn(1, 2, 8), torch.randn(1, 6, 8)
    mask = torch.ones(1, 2, 2, 3)
    mask[:, 1] = -1
    ours, published = (PrototypeAttention(8, num_heads=2, rescue=rule) for rule in ("query", "image"))  # type: ignore[arg-type]
    assert torch.equal(ours.choose(query, pixels, mask), ours.choose(query, pixels, None))
    assert bool((published.choose(query, pixels, mask)[:, :, 1] == 0).all())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads=3 do not divide dim=8"):
        PrototypeAttention(8, num_heads=3)
    with pytest.raises(ValueError, match="rescue='all' must be query or image"):
        PrototypeAttention(8, rescue="all")  # type: ignore[arg-type]


NARROW: dict[str, Any] = {
    "type": "PEM", "feature_size": 16, "mask_feature_size": 16, "hidden_dim": 16, "num_attention_heads": 4,
    "decoder_layers": 4, "dim_feedforward": 32, "num_queries": 6, "train_num_points": 64,
}  # fmt: skip


def segmenter(**more: Any) -> Any:
    torch.manual_seed(0)
    options = SegmentOptions(decode_head={**NARROW, **more})
    return build_segmenter(Model(name="biformer_atto"), options, dense=Dense(), classes=["a", "b", "c"], size=64)


def test_the_head_trains_every_weight_and_predicts_at_any_size():
    pytest.importorskip("transformers")
    model = segmenter()
    images, masks = torch.randn(2, 3, 72, 90), torch.randint(0, 3, (2, 72, 90))
    losses = [value for name, value in model(images, masks).items() if "loss" in name]
    torch.stack(losses).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    scores = model.eval()(images)
    assert scores.shape == (2, 3, 72, 90) and bool(scores.isfinite().all())
    names = model.decode_head.no_weight_decay()
    assert {"decoder.query.weight", "decoder.query_position.weight", "decoder.level_embed"} == names


def test_odd_maps_are_resized_to_the_finer_map():
    pixels = PemPixelDecoder([4, 4, 4, 4], dim=8, mask_dim=8).eval()
    sizes = [(13, 9), (7, 5), (3, 3), (1, 1)]
    found = pixels([torch.randn(2, 4, *size) for size in sizes])
    assert [one.shape[2:] for one in (found.mask_features, *found.multi_scale_features[::-1])] == sizes
    x = torch.randn(1, 2, 4, 6)
    assert resized(x, torch.empty(1, 2, 4, 6)) is x


def test_wrong_options_are_named():
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="num_attention_heads=3 do not divide hidden_dim=16"):
        segmenter(num_attention_heads=3)
    with pytest.raises(UserError, match="task.segment.decode_head has no option encoder_layers; it takes "):
        segmenter(encoder_layers=2)


class Parts(nn.Module):
    """Pixel decoder and decoder; the masks of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = PemPixelDecoder([4, 4, 4, 4], dim=8, mask_dim=8)
        self.decoder = PemDecoder(8, dim=8, queries=4, heads=2, hidden=8, layers=3, mask_dim=8)

    def forward(self, *maps: Tensor) -> Tensor:
        found = self.pixels(maps)
        states = self.decoder(multi_scale_features=found.multi_scale_features, mask_features=found.mask_features)
        return states.masks_queries_logits[-1]


def maps(side: int, other: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 4, -(-side // 2**level), -(-other // 2**level)) for level in range(4))


@pytest.mark.slow
def test_exports():
    parts, example = Parts().eval(), maps(13, 9)
    program = torch.export.export(parts, example)
    torch.testing.assert_close(program.module()(*example), parts(*example))


@pytest.mark.large
def test_compiles():
    module = PrototypeAttention(8, num_heads=2)
    arguments = torch.randn(2, 3, 8), torch.randn(2, 8, 5, 7), torch.randn(2, 3, 5, 7)
    found = torch.compile(module.eval())(*arguments)
    torch.testing.assert_close(found, module(*arguments))
    found.sum().backward()
