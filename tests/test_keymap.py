"""Key maps between published and our keys: placeholders, offsets, joined tensors, dropped keys."""

import pytest
import torch

from tessel.zoo._keymap import Edit, KeyMap, KeyRule, MissingKeys, Pattern, UnknownKeys

JOIN = Edit(
    to_ours=lambda q, kv: (torch.cat([q, kv]),),
    to_published=lambda qkv: (qkv[: len(qkv) // 3], qkv[len(qkv) // 3 :]),
)
RULES = [
    KeyRule("layers.{s}.merge.{p}", "stages.{s+1}.down.{p}"),
    KeyRule("layers.{s}.index", None),
    KeyRule(("layers.{s}.q.{p}", "layers.{s}.kv.{p}"), "stages.{s}.qkv.{p}", JOIN),
    KeyRule("head.{p}", "head.fc.{p}"),
]
PUBLISHED = {
    "layers.0.merge.weight": torch.randn(2, 2),
    "layers.1.q.bias": torch.randn(2),
    "layers.1.kv.bias": torch.randn(4),
    "head.weight": torch.randn(3, 2),
}
OURS = ("stages.1.down.weight", "stages.1.qkv.bias", "head.fc.weight")


def key_map(parameters=OURS, buffers=()) -> KeyMap:
    return KeyMap(RULES, name="toy", parameters=parameters, buffers=buffers)


def test_offsets_and_joined_tensors_in_both_directions():
    ours = key_map().from_published({**PUBLISHED, "layers.0.index": torch.zeros(1, dtype=torch.int64)})
    assert set(ours) == set(OURS)
    assert ours["stages.1.qkv.bias"].shape == (6,)
    back = key_map().to_published(ours)
    assert back.keys() == PUBLISHED.keys()
    assert all(torch.equal(back[k], v) for k, v in PUBLISHED.items())


def test_offset_does_not_match_negative_numbers():
    assert Pattern("stages.{s+1}.down.{p}").match("stages.0.down.weight") is None
    assert Pattern("stages.{s+1}.down.{p}").match("stages.4.down.weight") == {"s": "3", "p": "weight"}


def test_repeated_placeholder_must_have_one_value():
    pattern = Pattern("layers.{s}.blocks.{s}.{p}")
    assert pattern.match("layers.1.blocks.1.weight") and not pattern.match("layers.1.blocks.2.weight")


def test_missing_part_of_a_joined_tensor_is_an_error():
    with pytest.raises(MissingKeys, match=r"layers\.1\.kv\.bias"):
        key_map().from_published({k: v for k, v in PUBLISHED.items() if "kv" not in k})


def test_unknown_key_is_an_error_with_its_published_name():
    with pytest.raises(UnknownKeys, match=r"layers\.7\.merge\.weight"):
        key_map().from_published({**PUBLISHED, "layers.7.merge.weight": torch.zeros(1)})


def test_incomplete_buffers_are_an_error():
    buffers = ("head.fc.mean", "head.fc.var")
    with_buffers = key_map(buffers=buffers)
    assert set(with_buffers.from_published(PUBLISHED)) == set(OURS), "gradients have no buffers"
    with pytest.raises(MissingKeys, match=r"head\.var"):
        with_buffers.from_published({**PUBLISHED, "head.mean": torch.zeros(1)})


def test_integer_counters_have_no_published_key():
    ours = key_map().from_published(PUBLISHED)
    counter = {"stem.num_batches_tracked": torch.zeros((), dtype=torch.int64)}
    assert key_map().to_published({**ours, **counter}).keys() == PUBLISHED.keys()
