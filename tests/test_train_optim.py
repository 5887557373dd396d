"""Parameter groups, learning-rate schedule, gradient clipping, and the guard against non-finite gradients."""

from typing import Any

import pytest
import timm
import torch
import trainer

from tessel.train.errors import UserError
from tessel.train.optim.gradients import NonFiniteError, NonFiniteGuard, clip_gradients
from tessel.train.optim.optimizer import build_optimizer
from tessel.train.recipe.load import load_recipe
from tessel.train.recipe.plan import Plan
from tessel.train.recipe.schema import Optim


def test_guard_skips_then_stops():
    good, bad, loss = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(2.0)
    guard = NonFiniteGuard(2, torch.amp.GradScaler("cpu", enabled=False))
    applied = [guard.should_apply(step, norm, loss) for step, norm in enumerate([good, bad, bad, good, bad, bad])]
    assert applied == [True, False, False, True, False, False]
    with pytest.raises(NonFiniteError, match="gradient norm nan at step 6"):
        guard.should_apply(6, bad, loss)


def test_schedule_is_a_function_of_the_step(tmp_path):
    loaded = load_recipe(trainer.write_recipe(tmp_path / "tiny.yaml", data={"root": "unread"}))
    plan = Plan(steps=20, warmup=4, epoch_steps=5, micro_batch=4, accumulate=1, lr=1e-2, lr_text="")
    lr = trainer.learning_rate(loaded, plan)

    forwards = [lr(step) for step in range(20)]
    assert [lr(step) for step in reversed(range(20))] == forwards[::-1]
    assert forwards[0] == pytest.approx(1e-6) and max(forwards) == pytest.approx(1e-2, rel=0.1) and forwards[-1] < 1e-3


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "decay", "fragment"),
    [
        ("wsd", 20, 4, 17, "sched.decay_steps=17 (17 steps) does not fit sched.name=wsd: of 20 steps, 4 are warm-up"),
        ("wsd", 3, 1, None, "sched.decay_steps=null (0 steps)"),
        ("rsqrt", 20, 4, 17, "make it 1 to 16"),
        ("rsqrt", 20, 0, None, "give sched.warmup"),
        ("wsd", 20, 4, 16, None),
        ("rsqrt", 7, 4, None, None),
    ],
)
def test_invalid_decay_is_an_error_that_names_the_key(tmp_path, name, steps, warmup, decay, fragment):
    sched = {"name": name, "steps": steps, "warmup": warmup} | ({"decay_steps": decay} if decay else {})
    loaded = load_recipe(trainer.write_recipe(tmp_path / "tiny.yaml", data={"root": "unread"}, sched=sched))
    plan = Plan(steps=steps, warmup=warmup, epoch_steps=5, micro_batch=4, accumulate=1, lr=1e-2, lr_text="")
    if fragment is None:
        assert trainer.learning_rate(loaded, plan)(steps - 1) < 1e-2
        return
    with pytest.raises(UserError) as caught:
        trainer.learning_rate(loaded, plan)
    assert fragment in str(caught.value), str(caught.value)


def test_parameter_groups_decay_and_layers():
    model: Any = timm.create_model("test_vit")
    optimizer = build_optimizer(model, Optim(weight_decay=0.1, layer_decay=0.5), 1e-3)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or name in model.no_weight_decay()
        assert groups[id(parameter)]["weight_decay"] == (0 if exempt else 0.1), name
    assert groups[id(model.head.weight)]["lr_scale"] == 1
    assert (
        groups[id(model.patch_embed.proj.weight)]["lr_scale"] < groups[id(model.blocks[-1].mlp.fc1.weight)]["lr_scale"]
    )


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clip_returns_the_norm_before_clipping(mode):
    model = torch.nn.Linear(3, 3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    before = 10 * 12**0.5
    assert clip_gradients(torch.optim.SGD(model.parameters()), Optim(clip=0.5, clip_mode=mode)).item() == pytest.approx(
        before
    )
    after = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    assert after.norm() < before and (mode != "norm" or after.norm() == pytest.approx(0.5, rel=1e-4))
    assert mode != "value" or after.max() == 0.5
