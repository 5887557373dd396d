"""Mixture-of-head attention against a loop over positions, its loss of balance, and the trainer's use of it."""

import copy
from typing import Any

import pytest
import timm
import torch
import trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tessel.zoo
from tessel.blocks import Aggregated, FullAttention, LengthScaledCosine, MixtureOfHeads, collect_losses
from tessel.train.distributed.world import World
from tessel.train.recipe.load import load_recipe
from tessel.train.trainer import build

ATTENTIONS = {
    "full": lambda dim, heads: FullAttention(dim, num_heads=heads),
    "aggregated": lambda dim, heads: Aggregated(dim, num_heads=heads, reduction=2, trained_size=3),
    "cosine": lambda dim, heads: LengthScaledCosine(dim, num_heads=heads, trained_size=3),
}
# (heads, shared, routed)
HEADS = [(1, 1, 0), (3, 3, 0), (4, 1, 2), (5, 2, 2), (4, 2, 2), (4, 0, 3), (2, 1, 1)]


def make(heads: int, shared: int, routed: int, *, kind: str = "full", balance: float = 0.01) -> MixtureOfHeads:
    torch.manual_seed(0)
    dim = 2 * heads
    attention = ATTENTIONS[kind](dim, heads)
    return MixtureOfHeads(dim, attention=attention, shared=shared, routed=routed, balance=balance).double().eval()


def gates_of(gates: Any, u: Tensor, heads: int) -> tuple[list[Tensor], Tensor, list[int]]:
    """The weights of all heads for one position `u: [C]`, the probabilities of the routed heads, and those selected."""
    shared, routed = (
        [torch.ones((), dtype=u.dtype)] * gates.shared,
        [torch.zeros((), dtype=u.dtype)] * (heads - gates.shared),
    )
    if gates.shared > 1:
        powers = (gates.shared_router.weight @ u).exp()
        shared = list(gates.shared * powers / powers.sum())
    if not gates.routed:
        return shared, u.new_empty(0), []
    powers = (gates.routed_router.weight @ u).exp()
    selected = sorted(range(len(powers)), key=lambda e: -powers[e].item())[: gates.routed]
    total = sum(powers[e] for e in selected)
    for e in selected:
        routed[e] = gates.routed * powers[e] / total
    if gates.shared:
        first, second = (gates.group_router.weight @ u).exp()
        shared = [2 * first / (first + second) * gate for gate in shared]
        routed = [2 * second / (first + second) * gate for gate in routed]
    return shared + routed, powers / powers.sum(), selected


def by_loops(mixer: MixtureOfHeads, x: Tensor) -> Tensor:
    """The mixer for one image `[C, H, W]`, from the outputs of the heads."""
    y = mixer.attention(x[None])[0].clone()
    width = len(y) // mixer.num_heads
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            for head, gate in enumerate(gates_of(mixer.gates, x[:, i, j], mixer.num_heads)[0]):
                y[head * width : (head + 1) * width, i, j] *= gate
    return torch.einsum("oc,chw->ohw", mixer.proj.weight, y) + mixer.proj.bias[:, None, None]


@settings(deadline=None, max_examples=30)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    heads=st.sampled_from(HEADS),
    kind=st.sampled_from(sorted(ATTENTIONS)),
)
def test_equals_the_loop(size, heads, kind):
    mixer = make(*heads, kind=kind)
    x = torch.randn(2, mixer.proj.in_features, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_loops(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["full", "aggregated"])
def test_gradcheck(heads, kind):
    mixer = make(*heads, kind=kind)
    x = torch.randn(1, mixer.proj.in_features, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("shared, routed", [(4, 0), (1, 3), (0, 4)])
def test_with_zero_routers_and_all_heads_it_is_the_attention_alone(kind, shared, routed):
    attention = ATTENTIONS[kind](8, 4).double().eval()
    mixer = MixtureOfHeads(8, attention=copy.deepcopy(attention), shared=shared, routed=routed).double()
    for router in mixer.gates.children():
        nn.init.zeros_(router.weight)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), attention(x), rtol=1e-12, atol=1e-12)


def test_loss_of_balance_equals_the_loop_and_is_added_only_in_training():
    mixer = make(5, 2, 2, balance=0.5)
    x = torch.randn(2, 10, 3, 4, dtype=torch.float64)
    rows = [gates_of(mixer.gates, u, 5)[1:] for u in x.permute(0, 2, 3, 1).flatten(0, 2)]
    mean = torch.stack([probabilities for probabilities, _ in rows]).mean(0)
    shares = [sum(e in selected for _, selected in rows) / len(rows) for e in range(3)]
    with collect_losses(mixer) as losses:
        mixer(x)
        assert not losses
        mixer.train()(x)
    torch.testing.assert_close(losses[0], 0.5 * 3 * sum(m * share for m, share in zip(mean, shares, strict=True)))
    mixer(x)
    assert len(losses) == 1
    with collect_losses(all_shared := make(3, 3, 0).train()) as losses:
        all_shared(x[:, :6])
    assert not losses


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"shared": 5, "routed": 0}, "shared=5"),
        ({"shared": -1, "routed": 1}, "shared=-1"),
        ({"shared": 2, "routed": 3}, "routed=3"),
        ({"shared": 2, "routed": 0}, "set shared=4"),
        ({"shared": 0, "routed": 0}, "set shared=4"),
    ],
)
def test_constructor_errors(numbers, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfHeads(8, attention=FullAttention(8, num_heads=4), **numbers)


def test_under_autocast_the_output_has_the_dtype_of_the_attention():
    mixer = make(4, 1, 3).float()
    x = torch.randn(1, 8, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mixer(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    "name, parameters, keys",
    [
        ("moh_vit_s_80", 49_910_548, 1145),
        ("moh_vit_s_75", 49_910_548, 1145),
        ("moh_vit_b_75", 90_020_632, 1177),
        ("moh_vit_b_50", 90_023_512, 1197),
    ],
)
def test_sizes_and_keys_of_the_published_models(name, parameters, keys):
    model: Any = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(tessel.zoo.to_published(name, model.state_dict())) == keys
    assert not any("router" in key for key in model.no_weight_decay())
    mixers = [module for module in model.modules() if isinstance(module, MixtureOfHeads)]
    active = sum(mixer.gates.shared + mixer.gates.routed for mixer in mixers)
    assert round(100 * active / sum(mixer.num_heads for mixer in mixers)) == int(name[-2:])


@pytest.fixture
def recipe(tmp_path):
    aug = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}
    data = {"source": "digits", "size": 32, "batch": 4, "micro_batch": 2, "aug": aug}
    return trainer.write_recipe(
        tmp_path / "moh.yaml",
        model={"name": "moh_vit_atto", "drop_path_rate": None},
        data=data,
        sched={"steps": 2, "warmup": 0},
    )


def engine_and_means(recipe, *overrides):
    task, plan, engine = build(load_recipe(recipe, list(overrides)), World())
    batches = task.train_batches(plan, 0)
    means = engine.backward([next(batches)])
    batches.close()
    return task, engine, means


def test_the_trainer_adds_the_mean_of_the_losses_with_and_without_checkpointing(recipe):
    _, plain, means = engine_and_means(recipe)
    assert means["auxiliary_loss"] > 0
    # 0.01 k if the routed heads are selected evenly, k = 2
    assert means["auxiliary_loss"].item() == pytest.approx(0.02, rel=0.5)
    _, again, found = engine_and_means(recipe, "parallel.grad_checkpointing=true")
    for name, value in means.items():
        torch.testing.assert_close(found[name], value, msg=name)
    parameters = dict(again.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, msg=name)
    copy.deepcopy(again.model)  # which no tensor with a graph may hinder


def test_heads_that_are_not_selected_learn_from_the_loss_of_balance(recipe):
    _, engine, _ = engine_and_means(recipe)
    gates = engine.model.stages[3].blocks[0].mixer.fn.gates
    assert gates.routed_router.weight.grad.abs().sum(1).gt(0).all()


@pytest.mark.slow
def test_two_processes_train_with_either_strategy(recipe):
    shared = ["log.every=1", "eval.every=2", "ckpt.every=2", "parallel.grad_checkpointing=true"]
    ways = {name: [f"parallel.strategy={name}"] for name in ("ddp", "fsdp")}
    done = trainer.run_processes(2, *([recipe, *shared, *way, f"run.name={name}"] for name, way in ways.items()))
    assert trainer.exit_codes(done) == [[0, 0]] * 2, done.stdout + done.stderr
    curves = [
        [row["auxiliary_loss"] for row in trainer.metrics(recipe.parent / "runs" / name) if "auxiliary_loss" in row]
        for name in ways
    ]
    assert len(curves[0]) == 2 and curves[1] == pytest.approx(curves[0], rel=1e-4)
