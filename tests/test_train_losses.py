"""The losses in the log: means over updates, micro-batches and processes."""

import torch
import trainer

from tessel.train.distributed.world import World
from tessel.train.recipe.load import load_recipe
from tessel.train.run.loss_meter import LossMeter
from tessel.train.trainer import build


def scalars(**values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_a_log_line_has_the_mean_of_its_updates():
    losses = LossMeter(World())
    assert losses.totals() == losses.means() == {}
    losses.add(scalars(loss=1.0, loss_box=0.25))
    losses.add(scalars(loss=4.0, loss_box=0.5))
    assert losses.totals() == {"loss": 5.0, "loss_box": 0.75} and losses.updates == 2
    assert losses.means() == {"loss": 2.5, "loss_box": 0.375}
    assert losses.totals() == {} and losses.updates == 0


def test_restored_sums_continue():
    losses, resumed = LossMeter(World()), LossMeter(World())
    losses.add(scalars(loss=1.0))
    resumed.restore(losses.totals(), losses.updates)
    resumed.add(scalars(loss=2.0))
    assert resumed.means() == {"loss": 1.5}


def test_unlogged_losses_are_resumed_only_with_the_same_recipe(tmp_path):
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", data={"source": "digits"})
    with trainer.before_step(3):
        assert trainer.train(recipe, "log.every=5") == 0
    for keys, updates in (([], 3), (["optim.lr=1e-4"], 0)):
        engine = build(load_recipe(recipe, keys), World())[2]
        engine.resume(tmp_path / "runs/tiny/checkpoints/step-00000003")
        assert engine.losses.updates == updates and bool(engine.losses.totals()) == bool(updates)


def test_micro_batches_are_averaged(tmp_path):
    """Loss and gradient of two micro-batches are those of the batch they form together."""
    path = trainer.write_recipe(
        tmp_path / "tiny.yaml", model={"name": "test_convnext", "drop_path_rate": None}, data={"source": "digits"}
    )
    task, plan, engine = build(
        load_recipe(path, [f"data.aug.{name}=0" for name in ("erasing", "mixup", "cutmix")]), World()
    )
    batches = task.train_batches(plan, 0)
    first, second = next(batches), next(batches)
    batches.close()
    means = engine.backward([first, second])
    assert set(means) == {"loss"}
    weight = next(engine.model.parameters())
    gradient, weight.grad = weight.grad.clone(), None
    whole = task.loss(engine.model, (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), None))["loss"]
    whole.backward()
    torch.testing.assert_close(means["loss"].float(), whole.detach())
    torch.testing.assert_close(gradient, weight.grad)
