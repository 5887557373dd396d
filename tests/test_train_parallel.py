"""DDP, FSDP and HSDP give the result of one process, and their checkpoints can be exchanged."""

import shutil
from typing import Any

import pytest
import timm
import torch
import trainer
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from tessel.train.distributed.parallel import fsdp_units, prepare_model, synchronize_batch_norms, wrap_distributed
from tessel.train.distributed.world import World
from tessel.train.errors import UserError
from tessel.train.optim.ema import WeightAverage
from tessel.train.optim.gradients import clip_units
from tessel.train.recipe.schema import Dense, Ema, Model, Parallel
from tessel.train.run import checkpoint
from tessel.train.tasks.segment.model import build_segmenter
from tessel.train.tasks.segment.options import SegmentOptions

# a model without batch statistics, so that the number of processes does not change the result
SHARED = ["model.name=test_convnext", "log.every=1", "eval.every=2", "ckpt.every=2", "sched.steps=4"]
STRATEGIES = {"ddp": [], "fsdp": ["parallel.strategy=fsdp"], "hsdp": ["parallel.strategy=hsdp", "parallel.shard=1"]}
TESTED = ["ddp", "fsdp", pytest.param("hsdp", marks=pytest.mark.slow)]


def assert_same_curve(one, other, tolerance=1e-5):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert (left["kind"], left["step"]) == (right["kind"], right["step"])
        for key in left.keys() & {"loss", "grad_norm", "lr", "top1"}:
            assert right[key] == pytest.approx(left[key], abs=tolerance, rel=tolerance), (key, left["step"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """Directory of the runs `one` (one process) and `ddp`, `fsdp`, `hsdp` (two processes), of four steps each."""
    root = tmp_path_factory.mktemp("parallel")
    data = {"root": str(trainer.draw_folder(root / "images")), "micro_batch": 2}
    recipe = trainer.write_recipe(root / "tiny.yaml", data=data)
    assert trainer.train(recipe, *SHARED, "run.name=one") == 0
    slow = "not slow" not in request.config.option.markexpr
    runs = [[recipe, *SHARED, *way, f"run.name={name}"] for name, way in STRATEGIES.items() if name != "hsdp" or slow]
    done = trainer.run_processes(2, *runs)
    assert trainer.exit_codes(done) == [[0, 0]] * len(runs), done.stdout + done.stderr
    return root / "runs"


@pytest.mark.parametrize("way", TESTED)
def test_every_strategy_learns_the_same(finished, way):
    """With gradient accumulation, clipping, EMA, drop path and mixup; the exported weights too."""
    assert_same_curve(trainer.stable_metrics(finished / "one"), trainer.stable_metrics(finished / way))
    left, right = (trainer.tensors(finished / run / "checkpoints/step-00000004") for run in ("one", way))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    model = timm.create_model(f"local-dir:{finished / way}/export", pretrained=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, right[f"ema.{name}"], atol=0, rtol=0)


@pytest.mark.slow
def test_checkpoints_can_be_resumed_with_another_strategy(finished, capfd):
    """From two processes to one and back, from sharded to replicated and back: the loss curve continues."""
    recipe = finished.parent / "tiny.yaml"

    def begin(source, way):
        place = recipe.parent / f"{source}-{way}"
        shutil.copytree(finished / source, place / source, ignore=shutil.ignore_patterns("DONE", "step-00000004"))
        return [recipe, *SHARED, f"run.name={source}", f"run.out={place}"]

    for source in ("ddp", "fsdp"):
        assert trainer.train(*begin(source, "one")) == 0
        assert f"not bitwise: processes was 2, now 1, strategy was {source}" in capfd.readouterr().out
    pairs = [("one", "ddp"), ("one", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp"), ("hsdp", "fsdp"), ("fsdp", "fsdp")]
    done = trainer.run_processes(2, *([*begin(a, b), *STRATEGIES[b]] for a, b in pairs))
    assert trainer.exit_codes(done) == [[0, 0]] * len(pairs), done.stdout + done.stderr
    assert done.stdout.count("(exact)") == 1
    for source, way in [("ddp", "one"), ("fsdp", "one"), *pairs]:
        assert_same_curve(
            trainer.stable_metrics(finished / "one"), trainer.stable_metrics(recipe.parent / f"{source}-{way}" / source)
        )
    again = recipe.parent / "fsdp-fsdp/fsdp"
    trainer.assert_same_checkpoint(*(run / "checkpoints/step-00000004" for run in (again, finished / "fsdp")))


def test_adaptive_clipping_of_shards_is_that_of_unsharded_parameters(tmp_path):
    """The norm of a row or vector is that of the whole row or vector, also where it is sharded."""
    data = {"root": str(trainer.draw_folder(tmp_path / "images")), "micro_batch": 2}
    recipe = trainer.write_recipe(tmp_path / "tiny.yaml", data=data)
    clipped = [*SHARED, "optim.name=sgd", "optim.lr=0.1", "optim.clip=0.01", "optim.clip_mode=agc"]
    ways = {name: STRATEGIES[name] for name in ("ddp", "fsdp")} | {"free": ["optim.clip=null"]}
    done = trainer.run_processes(2, *([recipe, *clipped, *way, f"run.name={name}"] for name, way in ways.items()))
    assert trainer.exit_codes(done) == [[0, 0]] * len(ways), done.stdout + done.stderr
    states = {way: trainer.tensors(tmp_path / f"runs/{way}/checkpoints/step-00000004") for way in ways}
    differences = {True: 0.0, False: 0.0}
    for name, tensor in states["ddp"].items():
        torch.testing.assert_close(states["fsdp"][name], tensor, atol=1e-6, rtol=1e-6, msg=name)
        if name.startswith("model."):
            difference = float((states["free"][name] - tensor).abs().max())
            differences[tensor.ndim > 1] = max(difference, differences[tensor.ndim > 1])
    assert all(difference > 1e-4 for difference in differences.values()), (
        differences
    )  # both rows and vectors were clipped


def test_clip_units_equals_timm():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        for scale, parameter in enumerate(model.parameters()):
            parameter.grad = torch.linspace(0, scale, parameter.numel()).reshape(parameter.shape)
    adaptive_clip_grad(models[0].parameters(), 0.05)
    clip_units(list(models[1].parameters()), 0.05)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "biformer_atto", "tessel_halonet_atto"])
def test_sync_batch_norm_on_several_gpus(monkeypatch, name):
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # the modules can be inspected without a GPU
    image, several = torch.rand(2, 3, 64, 64), World(size=2, device=torch.device("cuda", 0))
    for world, wanted in [(World(device=several.device), True), (several, False), (several, True)]:
        model = timm.create_model(name).eval()
        before = model(image)
        model = prepare_model(model, Parallel(sync_batch_norm=wanted), world)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert norms and {isinstance(norm, nn.SyncBatchNorm) for norm in norms} == {wanted and world.size == 2}
        torch.testing.assert_close(model(image), before)  # the activations inside norms are kept


@pytest.mark.parametrize("wanted", [True, False])
def test_batch_norms_of_a_dense_backbone_can_stay_local(wanted):
    head = {"type": "FCNHead", "channels": 8, "in_index": 3, "num_convs": 1}
    options, dense = SegmentOptions(decode_head=head), Dense(sync_batch_norm=wanted)
    model = build_segmenter(Model(name="litv2_atto"), options, dense=dense, classes=["a", "b"])
    before = {name: type(module) for name, module in model.named_modules()}
    names = list(model.state_dict())
    synced = synchronize_batch_norms(model)
    changed = {name for name, module in synced.named_modules() if type(module) is not before[name]}
    assert any(name.startswith("decode_head") for name in changed)
    assert any(name.startswith("backbone") for name in changed) == wanted
    assert list(synced.state_dict()) == names


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "biformer_atto"])
def test_each_layer_is_an_fsdp_unit(name):
    model = timm.create_model(name)
    found = fsdp_units(model)
    assert found and len({id(layer) for layer in found}) == len(found)
    assert not any(isinstance(layer, nn.ModuleList) or layer is model for layer in found)
    held = {id(weight) for layer in found for weight in layer.parameters()}
    assert sum(w.numel() for w in model.parameters() if id(w) in held) > 0.5 * sum(
        w.numel() for w in model.parameters()
    )


def test_shard_groups_must_divide_the_processes():
    parallel = Parallel(strategy="hsdp", shard=3)
    with pytest.raises(UserError, match="parallel.shard=3 does not divide the 4 processes"):
        wrap_distributed(nn.Linear(2, 2), parallel, World(size=4))


def test_sharded_checkpoint_is_evaluated_on_one_process(finished, capfd):
    from tessel.train import evaluate

    target = finished / "fsdp/checkpoints/step-00000004"
    assert checkpoint.find_damage(target) is None and evaluate.main([str(target)]) == 0
    last = [record for record in trainer.metrics(finished / "fsdp") if record["kind"] == "eval"][-1]
    assert f"top1 {last['top1']:.2f}" in capfd.readouterr().out


def test_ema_update_and_swap():
    model: Any = torch.nn.BatchNorm1d(2)
    average = WeightAverage(model, Ema(decay=0.75, warmup=False))
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.num_batches_tracked.fill_(3)
    average.update(model, 1)
    assert average.state["weight"].tolist() == [2.0, 2.0] and average.state["num_batches_tracked"] == 3
    with average.applied_to(model):
        assert model.weight.tolist() == [2.0, 2.0]
    assert model.weight.tolist() == [5.0, 5.0]


def test_collectives_of_a_single_process():
    world = World()
    assert (
        world.any_rank(True)
        and not world.any_rank(False)
        and world.broadcast_object(3) == 3
        and world.gather("x") == ["x"]
    )


@pytest.mark.parametrize("size", [1, 2])
def test_sum_does_not_change_its_argument(monkeypatch, size):
    """Otherwise a running sum would count the other processes twice."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(size))
    losses = torch.ones((), dtype=torch.float64)
    world = World(size=size)
    assert [float(world.sum(losses)) for _ in range(3)] == [size] * 3 and losses == 1
    world.sum(losses).add_(1)
    assert losses == 1
