"""`TesselBackbone` under MMEngine's own Runner."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from openmm import config, draw_ade

from tessel import zoo
from tessel.train.errors import UserError
from tessel.train.openmmlab.compat import import_yapf
from tessel.zoo.dense import DenseBackbone

# OpenMMLab's packages are no longer maintained and emit warnings that cannot be fixed here
pytestmark = pytest.mark.filterwarnings("ignore")
import_yapf()
mmengine = pytest.importorskip("mmengine")


@pytest.fixture(scope="module")
def registered():
    import tessel.train.mmseg

    return tessel.train.mmseg


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    return draw_ade(tmp_path_factory.mktemp("ade"))


def runner(*args, **changed):
    from mmengine.config import Config
    from mmengine.runner import Runner

    return Runner.from_cfg(Config(config(*args, **changed)))


def scalars(work: Path) -> list[dict]:
    """The lines that the Runner logged, in order, without times and memory."""
    files = sorted(work.glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time" not in k and k != "memory"} for line in lines]


def test_trains_saves_resumes_evaluates(registered, ade, tmp_path):
    whole = runner(ade, tmp_path / "whole")
    before = {key: p.detach().clone() for key, p in whole.model.named_parameters()}
    whole.train()
    assert type(whole.model.backbone) is registered.TesselBackbone
    same = [k for k, p in whole.model.named_parameters() if p.dim() > 1 and torch.equal(p, before[k])]
    assert same == [], "every weight was trained"
    rows = [row for row in scalars(tmp_path / "whole") if "mIoU" in row]
    assert [row["step"] for row in rows] == [3, 6] and all(0 <= row["mIoU"] <= 100 for row in rows)

    short = {"type": "IterBasedTrainLoop", "max_iters": 3, "val_interval": 3}
    runner(ade, tmp_path / "parts", train_cfg=short).train()
    resumed = runner(ade, tmp_path / "parts", resume=True, experiment_name="resumed")
    resumed.train()
    assert resumed.iter == 6
    history = resumed.message_hub.get_scalar("train/loss")
    assert len(history.data[0]) == 6, "the history of the first part is there"
    for key, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], tensor, msg=key)


def test_checkpoint_that_runs_code_is_refused(registered, tmp_path):
    from mmengine.runner.checkpoint import _load_checkpoint

    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    class Worse:
        def __reduce__(self):
            return getattr, (OrderedDict, "fromkeys")

    for number, culprit in enumerate((Bad(), Worse())):
        file = tmp_path / f"{number}.pth"
        torch.save({"state_dict": {}, "meta": culprit}, file)
        with pytest.raises(UserError, match=r"was not read.*(mkdir|attribute 'fromkeys' of OrderedDict), which"):
            _load_checkpoint(str(file))
    assert not (tmp_path / "ran").exists()


def test_other_calls_of_torch_load_stay_strict(registered, tmp_path):
    from mmengine.logging import HistoryBuffer
    from mmengine.runner.checkpoint import _load_checkpoint

    file = tmp_path / "history.pth"
    history = HistoryBuffer([1.0, 3.0], [1, 1])
    torch.save({"history": history}, file)
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([np.dtype]):
        _load_checkpoint(str(file))
        assert np.dtype in torch.serialization.get_safe_globals(), "what the user had allowed stays allowed"
    assert _load_checkpoint(str(file))["history"].mean() == 2
    with pytest.raises(Exception, match="(?i)weights_only|HistoryBuffer"):
        torch.load(file)
    assert set(torch.serialization.get_safe_globals()) == before


def test_patching_twice_changes_nothing(registered):
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    from tessel.train.openmmlab.compat import patch_runner

    before = utils._init_dist_pytorch, MMDistributedDataParallel.__init__
    patch_runner()
    assert (utils._init_dist_pytorch, MMDistributedDataParallel.__init__) == before


def test_other_packages_resolve_the_name(registered):
    """This registry is a child of mmengine's root registry, as mmdetection's is."""
    from mmengine.registry import MODELS, Registry

    detection = Registry("model", parent=MODELS, scope="mmdet_like")
    backbone = detection.build(
        {"type": "TesselBackbone", "name": "biformer_atto", "out_indices": (1, 2, 3), "norms": [True, False, True]}
    )
    assert isinstance(backbone, DenseBackbone) and backbone.strides == [8, 16, 32]
    assert list(backbone.norms) == ["1", "3"]
    assert [len(m.shape) for m in backbone(torch.zeros(1, 3, 64, 64))] == [4, 4, 4]


@pytest.mark.parametrize("kind", ["own", "own in a segmenter", "own in a detector", "published", "published segmenter"])
def test_loads_initial_weights_from_a_file(registered, kind, tmp_path):
    classifier = timm.create_model("litv2_atto").state_dict()
    source = DenseBackbone("litv2_atto")
    for norm in source.norms.values():
        torch.nn.init.normal_(norm.weight)
    source.load_classifier(classifier)
    published = zoo.to_published("litv2_atto", classifier)
    body = {k: t for k, t in published.items() if not k.startswith(("norm.", "head."))}
    head = {"decode_head.conv_seg.weight": torch.zeros(1)}
    norms = {f"norm{key}": t for key, t in source.norms.state_dict().items()}
    pyramid = {"backbone.fpn.inner_blocks.0.0.weight": torch.zeros(1)}
    detector = {f"backbone.body.{k}": t for k, t in source.state_dict().items()} | pyramid
    state = {
        "own": classifier,
        "own in a segmenter": {f"backbone.{k}": t for k, t in source.state_dict().items()} | head,
        "own in a detector": detector,
        "published": published,
        "published segmenter": {f"backbone.{k}": t for k, t in (body | norms).items()} | head,
    }[kind]
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    how = {"init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")}}
    if kind == "published":
        how = {"checkpoint": str(tmp_path / "weights.pth")}
    backbone = registered.TesselBackbone("litv2_atto", **how)
    backbone.init_weights()
    loaded, wanted = backbone.state_dict(), source.state_dict()
    keys = [key for key in wanted if " in a " in kind or "segmenter" in kind or key.startswith("body.")]
    assert all(torch.equal(loaded[key], wanted[key]) for key in keys)
    if " in a " in kind:
        with pytest.raises(ValueError, match="weights.pth: .*size mismatch"):
            registered.TesselBackbone(
                "litv2_atto", checkpoint=str(tmp_path / "weights.pth"), dims=(16, 32, 64, 48)
            ).init_weights()


def test_published_segmenter_loads_into_the_surrounding_model(registered):
    source = DenseBackbone("cswin_atto")
    for norm in source.norms.values():
        torch.nn.init.normal_(norm.weight)
    classifier = timm.create_model("cswin_atto").state_dict() | source.body.state_dict()
    published = zoo.to_published("cswin_atto", classifier)
    state = {f"backbone.{k}": t for k, t in published.items() if not k.startswith(("norm.", "head."))}
    state |= {f"backbone.norm{int(k[0]) + 1}{k[1:]}": t for k, t in source.norms.state_dict().items()}
    around = torch.nn.ModuleDict({"backbone": registered.TesselBackbone("cswin_atto"), "head": torch.nn.Linear(2, 2)})
    head = {f"head.{key}": tensor for key, tensor in around["head"].state_dict().items()}
    around.load_state_dict(state | head)
    for key, tensor in source.state_dict().items():
        assert torch.equal(around["backbone"].state_dict()[key], tensor), key
    own = {key: torch.zeros_like(tensor) for key, tensor in around.state_dict().items()}
    around.load_state_dict(own)
    assert not any(tensor.any() for tensor in around.state_dict().values())
    with pytest.raises(ValueError, match="rubbish"):
        around.load_state_dict(state | head | {"backbone.rubbish": torch.zeros(1)})


@pytest.mark.parametrize(
    "how",
    [
        {"init_cfg": {"type": "Kaiming"}},
        {"init_cfg": {"type": "Pretrained", "checkpoint": "a.pth", "prefix": "backbone."}},
        {"init_cfg": {"type": "Pretrained", "checkpoint": "a.pth"}, "checkpoint": "b.pth"},
    ],
)
def test_other_init_cfgs_are_rejected(registered, how):
    with pytest.raises(UserError, match="init_cfg=.*checkpoint=FILE"):
        registered.TesselBackbone("cswin_atto", **how)


def test_learning_rates_by_layer(registered):
    from mmengine.optim import build_optim_wrapper

    model = torch.nn.ModuleDict({"backbone": registered.TesselBackbone("cswin_atto"), "head": torch.nn.Linear(2, 2)})
    rates = {"stem": 0.1, "stages.0": 0.2, "stages.2.blocks.0.": 0.5}
    keys = {f"backbone.body.{key}": {"lr_mult": rate} for key, rate in rates.items()}
    optimizer = {"type": "SGD", "lr": 1.0}
    built = build_optim_wrapper(model, {"optimizer": optimizer, "paramwise_cfg": {"custom_keys": keys}})
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[group["params"][0]]: group["lr"] for group in built.optimizer.param_groups}
    assert found.keys() == set(names.values())
    for name, rate in found.items():
        wanted = next((r for key, r in rates.items() if name.startswith(f"backbone.body.{key}")), 1.0)
        assert rate == pytest.approx(wanted), name
    assert all(any(rate == pytest.approx(r) for rate in found.values()) for r in rates.values())


def snippets() -> list[str]:
    page = Path(__file__).resolve().parent.parent / "docs" / "openmmlab.md"
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run_snippet(ade: Path, work: Path, *launch: str, more: tuple[str, ...] = ()) -> list[dict]:
    """Train a small version of the page's config with mmsegmentation's script; return the lines it logged."""
    work.mkdir(exist_ok=True)
    (work / "config.py").write_text(snippets()[0])
    small = {
        "model.backbone.name": "cswin_atto",
        "model.backbone.pretrained": False,
        "model.decode_head.in_channels": DenseBackbone("cswin_atto").channels,
        "model.decode_head.channels": 8,
        "model.auxiliary_head.in_channels": DenseBackbone("cswin_atto").channels[2],
        "model.auxiliary_head.channels": 8,
        "model.data_preprocessor.size": (64, 64),
        "train_dataloader.dataset.pipeline.2.scale": (128, 64),
        "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
        "val_dataloader.dataset.pipeline.1.scale": (128, 64),
        **{f"{split}_dataloader.dataset.data_root": str(ade) for split in ("train", "val")},
        **{f"{split}_dataloader.num_workers": 0 for split in ("train", "val")},
        "train_dataloader.persistent_workers": False,
        "train_cfg.max_iters": 3,
        "train_cfg.val_interval": 3,
        "default_hooks.logger.interval": 1,
    }
    options = [f"{key}={str(value).replace(' ', '')}" for key, value in small.items()]
    script = Path(importlib.util.find_spec("mmseg").origin).parent / ".mim" / "tools" / "train.py"
    command = [sys.executable, *launch, str(script), str(work / "config.py"), "--work-dir", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    launcher = ["--launcher", "pytorch"] if launch else []
    run = subprocess.run(
        [*command, *launcher, "--cfg-options", *options, *more],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return scalars(work)


def test_config_in_the_docs(registered, ade, tmp_path):
    rows = run_snippet(ade, tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert [row["step"] for row in rows if "mIoU" in row] == [3]
    assert {"decode.loss_ce", "aux.loss_ce"} <= rows[0].keys()
    assert (tmp_path / "run" / "iter_3.pth").is_file()


@pytest.mark.slow
def test_two_processes(registered, ade, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    plain = [f"model.{head}.norm_cfg.type=BN" for head in ("decode_head", "auxiliary_head")]
    rows = run_snippet(ade, tmp_path / "run", *launch, more=tuple(plain))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "mIoU" in row] == [3]
    text = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert "Distributed training: True" in text and "GPU number: 2" in text
    state = torch.load(tmp_path / "run" / "iter_3.pth", weights_only=False)
    assert not any(key.startswith("module.") for key in state["state_dict"])


def test_detector_config_in_the_docs(registered):
    from mmengine.registry import MODELS, Registry

    scope: dict = {}
    exec(snippets()[1], scope)
    backbone = scope["model"]["backbone"]
    assert backbone.pop("_delete_") and backbone.pop("pretrained")
    built = Registry("model", parent=MODELS, scope="mmdet_page").build(backbone)
    assert built.channels == scope["model"]["neck"]["in_channels"] and built.batch_norm == "eval"
