"""`load`: from a name or a path to a `Predictor`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import torch
from torch import nn

from ..train.errors import UserError
from .networks import ExportedDetector, ExportedNetwork, TorchNetwork, pick_device
from .predictor import Predictor, TaskModel
from .published import build_published, is_recipe
from .tasks import Classifier, Detector, MultiLabelClassifier, Segmenter

RECIPE = "recipe.yaml"  # of a run
# endings of exported files: a name with one of them is not a misspelled model
FILE_ENDINGS = {".onnx", ".pt2", ".pt", ".pte", ".xml"}


def load(
    source: str | Path,
    *,
    device: str = "auto",
    weights: str | Path | None = None,
    size: int | None = None,
    pretrained: bool = True,
) -> Predictor:
    """A model that is ready to predict, in evaluation mode.

    source: the name of a model of timm or tessel with published weights ("cswin_tiny", "hf-hub:OWNER/NAME"); that of a
        recipe whose segmenter or detector is published ("ade20k/nat_tiny_upernet"); a finished run, or its `export/`;
        or a file of `tessel export`, which computes on the CPU.
    device: "auto" (the accelerator that torch finds, else the CPU) or a device of torch.
    weights: a file with the weights of the model or recipe `source`, instead of the published ones.
    size: side of the images that a classifier gets, instead of the one it was trained with.
    pretrained: False gives the name of a model or recipe random weights.

    Raises UserError if there is no such model, run or file, or it cannot be read.
    """
    path = Path(source).expanduser()
    is_run = path.is_dir() and not _only_named_like_a_model(path)
    if weights is not None and (is_run or path.is_file()):
        raise UserError(f"weights={weights} has no effect on {source}, which has its own weights; remove it")
    if is_run:
        model = _from_folder(path, device, size)
    elif path.is_file():
        model = _from_file(path, size)
    elif is_recipe(str(source)):
        recipe, network = build_published(str(source), weights, pretrained=pretrained)
        model = _dense(network, recipe.task.kind, recipe, path, device, size)
    else:
        model = _from_name(str(source), device, weights, size, pretrained)
    return Predictor(str(source), model)


def _only_named_like_a_model(folder: Path) -> bool:
    """Whether a folder is neither a run nor an export, and a model has its name."""
    import timm

    from .. import zoo as zoo  # registers the models with timm

    known = any((folder / name).is_file() for name in (RECIPE, "config.json"))
    return not known and timm.is_model(str(folder))


def _from_name(name: str, device: str, weights: str | Path | None, size: int | None, pretrained: bool) -> TaskModel:
    import timm

    from ..train.tasks.models import check_name, create_model

    if ":" not in name and not timm.is_model(name) and ("/" in name or Path(name).suffix in FILE_ENDINGS):
        raise UserError(f"{name}: there is no such run, export or file")
    check_name(name, "the model")
    overlay: dict[str, Any] = {}
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"weights={weights}: no such file")
        overlay = {"pretrained_cfg_overlay": {"file": str(weights)}}
    known = timm.get_pretrained_cfg(name) if ":" not in name else None
    side = size or (known.input_size[-1] if known is not None else 224)
    model = create_model(name, side, key="the model", pretrained=pretrained, num_classes=None, **overlay)
    return _classifier(model, device, size)


def _from_folder(path: Path, device: str, size: int | None) -> TaskModel:
    from ..train.evaluation import load_run
    from ..train.recipe.registry import TASKS
    from ..train.tasks.export import CONFIG

    recipe = None
    if (path / RECIPE).is_file():
        recipe, model = load_run(path)
        kind, folder = recipe.task.kind, path / "export"
    elif (path / CONFIG).is_file():
        kind, folder = str(_read_json(path / CONFIG).get("task", "classify")), path
        if kind not in TASKS:
            raise UserError(f"{path}: an export of the unknown task {kind!r}; install the package that has it")
        model = resolve_name(TASKS[kind].load)(path)
    else:
        raise UserError(f"{path} is neither a run nor an export: it has no {RECIPE} and no {CONFIG}")
    config = _read_json(folder / CONFIG)
    background = _background(config if recipe is None else {"background": recipe.data.background})
    if kind == "classify":
        return _classifier(model, device, size, **background)
    if kind == "multilabel":
        plain = _classifier(model, device, size)
        thresholds = config["thresholds"]
        return MultiLabelClassifier(plain.network, plain.classes, plain.config, thresholds=thresholds, **background)
    return _dense(model, kind, recipe, path, device, size, **background)


def _dense(
    model: Any, kind: str, recipe: Any, path: Path, device: str, size: int | None, **background: Any
) -> TaskModel:
    """A segmenter or detector, that of a recipe or of the export at `path` without one."""
    from ..train.recipe.registry import TASKS

    if size is not None:
        raise UserError(f"size={size} has no effect with task.kind={kind}; remove it")
    network = TorchNetwork(model, pick_device(device))
    if kind in ("detect", "panoptic"):
        resizing: Any = model.transform
        options = {"size": resizing.min_size[-1], "padding": resizing.image_mean, **background}
        if kind == "panoptic":
            options["panoptic"] = {"things": model.things, **dataclasses.asdict(cast(Any, model.options))}
        return Detector(network, cast(list[str], model.classes), **options)
    if kind == "segment":
        return _segmenter(network, recipe, path, **background)
    raise UserError(f"{path}: predictions of task.kind={kind} are not known here; use {TASKS[kind].load_hint}")


def _background(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The argument `background`, if it is known: exports of earlier versions do not say it."""
    return {"background": tuple(facts["background"])} if "background" in facts else {}


def _segmenter(network: TorchNetwork, recipe: Any, path: Path, **background: Any) -> Segmenter:
    """The segmenter of a run with this recipe, or of the export at `path` without one."""
    from ..train.recipe.schema import Dense
    from ..train.tasks.export import read_export
    from ..train.tasks.segment.options import SegmentOptions

    if recipe is not None:
        test, data = recipe.task.segment.test, {"img_scale": recipe.data.img_scale, "size": recipe.data.size}
    else:
        config = read_export(path, "segment", {"dense": Dense, "segment": SegmentOptions})
        test, data = config["segment"].test, config.get("data", {})  # exports of earlier versions have no data
    model: Any = network.module
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    options = {"palette": model.palette, "mean": mean, "std": std, "test": test, **data, **background}
    return Segmenter(network, model.classes, **options)


def _classifier(model: nn.Module, device: str, size: int | None, **background: Any) -> Classifier:
    from timm.data import resolve_data_config

    cfg: Any = model.pretrained_cfg
    wanted = {"input_size": (cfg["input_size"][0], size, size)} if size else {}
    config = resolve_data_config(wanted, pretrained_cfg=cfg)
    return Classifier(TorchNetwork(model, pick_device(device)), class_names(model), config, **background)


def class_names(model: Any) -> list[str]:
    """Names of the outputs of a classifier: those of its configuration, else of ImageNet by their number."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = model.pretrained_cfg.get("label_names")
    if names:
        known = set(ImageNetInfo().label_names())
        if not set(names) <= known:
            return list(names)
        return [ImageNetInfo().label_name_to_description(name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f"class {index}" for index in range(model.num_classes)]
    return ImageNetInfo(subset).label_descriptions()  # type: ignore[return-value]


def _from_file(path: Path, size: int | None) -> TaskModel:
    """The model of an exported file, by its metadata; an input of fixed size wins over `size`."""
    network = ExportedNetwork(path)
    facts, fixed = network.metadata, network.size
    if size is not None and fixed not in (None, (size, size)):
        raise UserError(f"size={size}: {path} accepts images of {fixed[0]} x {fixed[1]} pixels only")
    task = facts.get("task")
    background = _background(facts)
    try:
        if task in ("classify", "multilabel"):
            sides = fixed or ((size, size) if size else tuple(facts["input_size"][-2:]))
            config = {**facts, "input_size": (facts["input_size"][0], *sides)}
            classes = facts["class_names"] or _numbered(network, config["input_size"])
            if task == "multilabel":
                thresholds = facts["thresholds"]
                return MultiLabelClassifier(network, classes, config, thresholds=thresholds, **background)
            return Classifier(network, classes, config, **background)
        if task == "segment":
            keys = ("palette", "mean", "std", "test", "img_scale", "size")
            options: dict[str, Any] = {key: facts.get(key) for key in keys}
            return Segmenter(network, facts["class_names"], **options, fixed_size=fixed, **background)
        if task == "detect":
            rules = facts.get("panoptic")
            place = {"size": facts["size"], "padding": facts["padding"], "panoptic": rules}
            exported = ExportedDetector(network, facts["padding"], rules)
            return Detector(exported, facts["class_names"], **place, **background)
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} does not say how its images are prepared ({reason}); `tessel export` writes files that do"
        ) from error
    if task is None:
        raise UserError(f"{path} does not say what it predicts; `tessel export` writes files that do")
    raise UserError(f"{path}: predictions with an exported file of task {task!r} are not supported")


def _numbered(network: ExportedNetwork, input_size: tuple[int, ...]) -> list[str]:
    """Names for the outputs of a classifier without names."""
    return [f"class {index}" for index in range(network(torch.zeros(1, *input_size)).shape[1])]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
