"""Models with converted published weights reproduce the golden records in float64."""

import re

import golden
import pytest
import timm
import torch

import tessel.zoo

TOLERANCE = 1e-9

RECORDS = sorted(path.name.removesuffix(".json.gz") for path in golden.RECORDS.glob("*.json.gz"))
# variants are listed from small to large: the first of a family with a record runs by default, the others are slow
FIRST = [next((name for name in f.variants if name in RECORDS), None) for f in tessel.zoo.list_families()]
PARAMS = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in RECORDS]


@pytest.fixture(scope="module", params=PARAMS)
def record(request):
    return golden.load(request.param)


def model_of(record) -> str:
    """The name of the model; records at other sizes than the model's own have the size behind it."""
    return re.sub(r"_\d+x\d+$", "", record["model"])


def test_outputs_and_gradients_equal_the_record(record):
    name, state = model_of(record), golden.published_state(record)
    model = timm.create_model(name).double().eval()
    assert sum(p.numel() for p in model.parameters()) == record["n_params"]
    model.load_state_dict(tessel.zoo.from_published(name, state), strict=True)
    x = golden.draw("input", record["input_shape"]).requires_grad_()
    final, features = model.forward_intermediates(x)
    logits = model.forward_head(final)
    found = golden.errors(record, logits=logits, features=features)
    if "grad_norms" in record:
        (logits * golden.draw("loss", logits.shape)).sum().backward()
        # parameters that only training uses have no gradient here, and a zero in the record
        grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
        published = tessel.zoo.to_published(name, grads)
        found |= golden.gradient_errors(record, input_grad=x.grad, grads=published)
    assert max(found.values()) <= TOLERANCE, {k: v for k, v in found.items() if v > TOLERANCE}


def test_every_key_is_converted_in_both_directions(record):
    name, state = model_of(record), golden.published_state(record)
    counters = {key: torch.zeros(shape, dtype=torch.int64) for key, shape, _ in record["index_buffers"]}
    ours = tessel.zoo.from_published(name, {**state, **counters})
    back = tessel.zoo.to_published(name, ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    own = timm.create_model(name).state_dict()
    assert tessel.zoo.to_published(name, own).keys() == state.keys()


def test_unknown_and_missing_keys_are_named(record):
    name, state = model_of(record), golden.published_state(record)
    with pytest.raises(ValueError, match="no_such_layer.weight"):
        tessel.zoo.from_published(name, {**state, "no_such_layer.weight": torch.zeros(1)})
    first, *_, last = state
    for key in (first, last):
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            tessel.zoo.from_published(name, {k: v for k, v in state.items() if k != key})
    ours = tessel.zoo.from_published(name, state)
    with pytest.raises(ValueError, match="head.fc.weight"):
        tessel.zoo.to_published(name, {k: v for k, v in ours.items() if k != "head.fc.weight"})
    with pytest.raises(ValueError, match="no_such_layer"):
        tessel.zoo.to_published(name, {**ours, "no_such_layer": torch.zeros(1)})


def test_every_record_has_a_registered_model():
    assert {model_of({"model": name}) for name in RECORDS} <= set(tessel.zoo.list_models())


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="biformer_tyni.*biformer_tiny"):
        tessel.zoo.from_published("biformer_tyni", {})
