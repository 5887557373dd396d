"""Attention with a temperature by position against the record of the published module, and without an order."""

import math

import golden
import pytest
import torch

from tessel.blocks import FullAttention, PositionTemperature


def test_causal_attention_equals_the_record():
    record = golden.load("modules/selective_position_temperature")
    mixer = PositionTemperature(24, num_heads=3, causal=True).double()
    names = {key: key.replace("c_attn", "qkv").replace("c_proj", "proj") for key, _ in record["state"]}
    mixer.load_state_dict({names[key]: tensor for key, tensor in golden.published_state(record).items()})
    drawn = golden.draw("input", record["input_shape"])
    # 20 tokens as a map of 4 rows, which are read one after the other
    x = drawn.transpose(1, 2).unflatten(2, (4, 5)).requires_grad_()
    y = mixer(x).flatten(2).transpose(1, 2)
    assert golden.relative_error(y, record["logits"]) <= 1e-9
    (y * golden.draw("loss", drawn.shape)).sum().backward()
    assert float(x.grad.norm()) == pytest.approx(record["input_grad_norm"], rel=1e-9)
    for key, norm in record["grad_norms"].items():
        assert float(mixer.get_parameter(names[key]).grad.norm()) == pytest.approx(norm, rel=1e-9), key


@pytest.mark.parametrize("size", [(1, 1), (2, 3)], ids=str)
def test_without_an_order_all_logits_have_one_factor(size):
    mixer, plain = PositionTemperature(8, num_heads=2).double(), FullAttention(8, num_heads=2).double()
    state = mixer.state_dict()
    factor = 1 + math.exp(-math.exp(state.pop("beta"))) * math.log(math.prod(size))
    plain.load_state_dict(state)
    with torch.no_grad():
        plain.qkv.weight[:8] *= factor
        plain.qkv.bias[:8] *= factor
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mixer(x), plain(x), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


def test_constructor_errors():
    with pytest.raises(ValueError, match=r"dim=8.*num_heads=3"):
        PositionTemperature(8, num_heads=3)
