"""`tessel weights`: published weights: list, download, check, convert, import, reproduce and push."""

from pathlib import Path
from typing import Any, NamedTuple

import click

from .completion import complete_models
from .forwarded import PACKAGE, forwarded
from .group import InOrder

CHECKPOINTS = f"{PACKAGE}.checkpoints.__main__"


@click.group(cls=InOrder, short_help="Published weights: list, fetch, import, reproduce, push.")
def weights() -> None:
    """Published weights: list, download, check, convert, import, reproduce, push."""


for name, usage, text in (
    ("list", "[PATTERN]", "List them: size, license, accuracy, download."),
    ("fetch", "NAME", "Download a file to the cache, and print its sha256."),
    ("verify", "FILE", "Compare a file with the manifest."),
    ("convert", "IN OUT --model NAME", "Convert the keys of a checkpoint."),
):
    weights.add_command(forwarded(name, f"{CHECKPOINTS}:main", usage, text, prefix=(name,)))


@weights.command("import", short_help="Keep a file that was downloaded by hand.")
@click.argument("model", shell_complete=complete_models)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Folder of the cache, if it is another.")
def import_(model: str, file: Path, cache_dir: Path | None) -> int:
    """Keep FILE, published weights of MODEL that were downloaded by hand: `pretrained=True` finds them from then on.

    MODEL is a name that `tessel weights list` prints, or that of a model with one set of weights. The file is read
    without running code in it, and refused unless it holds every weight of the model, with its shape and finite.

    \b
    tessel weights import biformer_small biformer_small_best.pth
    """
    from ..train.errors import report_errors

    with report_errors() as outcome:
        path = import_weights(model, file, cache_dir)
        print(f"{path}: kept; `timm.create_model({model!r}, pretrained=True)` loads it")
    return outcome.code


def import_weights(model: str, file: Path, cache_dir: Path | None = None) -> Path:
    """Check and convert a file of published weights, and keep it in the cache. Raises UserError if it does not fit."""
    import timm

    from .. import zoo as zoo  # registers the models with timm
    from ..checkpoints import find_weight, keep_imported, verify
    from ..train.errors import UserError, one_line
    from ..train.tasks.models import CREATE_ERRORS

    try:
        weight = find_weight(model)
        if weight.sha256:
            verify(file, weight.sha256)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        network = timm.create_model(weight.name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    except CREATE_ERRORS as error:
        raise UserError(f"{file} does not hold the weights {weight.name}: {one_line(error)}") from error
    state = {key: tensor for key, tensor in network.state_dict().items() if tensor.is_floating_point()}
    try:
        return keep_imported(weight, state, cache_dir=cache_dir)
    except OSError as error:
        raise UserError(f"{error}; set TESSEL_HOME to a folder that can be written") from error


@weights.command(short_help="Evaluate published weights, and compare.")
@click.argument("model", metavar="MODEL|RECIPE", shell_complete=complete_models)
@click.option("--data", "root", required=True, type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option("--weights", "file", type=click.Path(path_type=Path), metavar="FILE", help="A local file of them.")
@click.option("--published", type=float, help="Published value. [default: that of the manifest or the recipe's head]")
@click.option("--tolerance", type=float, default=0.1, show_default=True, help="Accepted difference in percent points.")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
def reproduce(
    model: str,
    root: Path,
    file: Path | None,
    published: float | None,
    tolerance: float,
    overrides: tuple[str, ...],
) -> int:
    """Evaluate published weights as published, compare with the published value, and print the line to record.

    MODEL is a classifier with published weights, evaluated on ROOT/val of ImageNet: size, crop, interpolation and
    normalization are those of the manifest. RECIPE is a recipe of segmentation or detection; the weights in FILE, with
    the names of mmsegmentation or mmdetection, are evaluated by it on the data set in ROOT.

    The arithmetic is float32. Overrides are keys of a recipe, such as data.workers=8 or run.device=cpu. The exit code
    is 1 if the value differs by more than the tolerance.

    \b
    tessel weights reproduce cswin_tiny.in1k --data IMAGENET
    tessel weights reproduce coco/mask_rcnn_3x_nat_tiny --data COCO
    tessel weights reproduce ade20k/van_b2_upernet --data ADE20K --weights van_b2_upernet.pth
    """
    from ..train.errors import UserError, report_errors

    with report_errors() as outcome:
        keys = [f"data.root={root}", "parallel.precision=fp32", *overrides]
        found = (
            _of_recipe(model, keys, file) if "/" in model or model.endswith(".yaml") else _of_model(model, keys, file)
        )
        reference = found.published if published is None else published
        difference = "" if reference is None else f"{reference:.3f}, difference {found.value - reference:+.3f}"
        print(
            f"{found.source}: {found.name} {found.value:.3f} on {found.count} images, published {difference or 'none'}"
        )
        print("\n".join(found.record))
        if reference is not None and abs(found.value - reference) > tolerance:
            raise UserError(f"{found.name} {found.value:.3f} is not the published {reference}")
    return outcome.code


class Measured(NamedTuple):
    """A measured metric. source: name or file of the weights; record: lines for the user to copy into our list."""

    source: str
    name: str
    value: float
    count: int
    published: float | None
    record: list[str]


def _of_model(model: str, keys: list[str], file: Path | None) -> Measured:
    from ..checkpoints import find_weight
    from ..train.errors import UserError
    from ..train.evaluate import check_eval_keys, evaluate_model

    try:
        weight = find_weight(model)
    except ValueError as error:
        raise UserError(str(error)) from error
    found = evaluate_model(weight.name, check_eval_keys(keys), {}, file)["val"]
    record = [f'in checkpoints/manifest.toml, ["{weight.name}"]:', f"reproduced_top1 = {found['top1']:.3f}"]
    return Measured(weight.name, "top-1", found["top1"], found["count"], weight.published_top1, record)


def _of_recipe(recipe: str, keys: list[str], file: Path | None) -> Measured:
    from ..predict.published import fetch_published
    from ..train.reproduce import evaluate_published

    weights, state_key = (file, "") if file is not None else fetch_published(recipe)
    metrics, names, expected, published = evaluate_published(recipe, keys, weights, state_key=state_key)
    (name, value), *_ = values = [(title, metrics[key]) for key, title in names.items()]
    line = ", ".join(f"{title} {number:.1f}" for title, number in values)
    record = [f"in {recipe}:", f"# expected:   {expected}", f"# reproduced: {line}, with the weights {weights.name}"]
    if file is None:
        record += [f'in checkpoints/dense.toml, ["{recipe}"]:', f"reproduced = {value:.3f}"]
    return Measured(weights.name, name, value, metrics["count"], published, record)


@weights.command(short_help="Put a classifier on the Hugging Face hub.")
@click.argument("source", metavar="MODEL|RUN|EXPORT")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a private repository.")
@click.option("--license", "license_", help="License of the weights. [default: that of the published file]")
@click.option("--dry-run", is_flag=True, help="Print the model card; push nothing.")
def push(source: str, repository: str, private: bool, license_: str | None, dry_run: bool) -> int:
    """Put a classifier, converted or trained, on the Hugging Face hub in timm's format, with a model card.

    `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` and `tessel predict hf-hub:OWNER/NAME` load it. Log
    in with `hf auth login` first.
    """
    from ..train.errors import UserError, report_errors

    with report_errors() as outcome:
        from timm.models import push_to_hf_hub
        from timm.models._hub import generate_readme

        from ..predict import load
        from .cards import model_card

        predictor: Any = load(source, device="cpu")
        if predictor.task != "classify" or not hasattr(predictor.model.network, "module"):
            raise UserError(f"{source}: only classifiers, by name or as a run, have timm's format")
        card, module = model_card(source, predictor, repository, license_), predictor.model.network.module
        names = module.pretrained_cfg.get("label_names")
        if dry_run:
            print(generate_readme(card, repository.rpartition("/")[2]))
            return 0
        try:
            url = push_to_hf_hub(
                module,
                repository,
                private=private,
                model_config={"label_names": list(names)} if names else None,
                model_card=card,
                safe_serialization=True,
                data_config=predictor.model.config,
            )
        except Exception as error:  # of huggingface_hub, requests and the network
            raise UserError(f"{repository} could not be pushed: {error}") from error
        print(url)
    return outcome.code
