"""`tessel export`: a model in the format of another runtime."""

from pathlib import Path

import click

FORMATS = ("onnx", "torch-export", "aoti", "openvino", "executorch", "torchscript-trace")
SUFFIXES = {
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "aoti": ".aoti.pt2",
    "openvino": ".xml",
    "executorch": ".pte",
    "torchscript-trace": ".pt",
}
DYNAMIC = ("batch", "size")


def parse_dynamic(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else ()
    if unknown := [name for name in names if name not in DYNAMIC]:
        raise click.BadParameter(f"{unknown[0]!r} is neither batch nor size")
    return names


def default_path(model: str, format_: str) -> Path:
    """A file in the current folder, named after the model or the run."""
    folder = Path(model).resolve()
    name = model.replace("/", "_").replace(":", "_")
    if folder.exists():
        name = folder.parent.name if folder.name == "export" else folder.name
    return Path(name + SUFFIXES[format_])


@click.command(short_help="Export a model to ONNX and other formats, and compare it.")
@click.argument("model")
@click.option("--format", "format_", type=click.Choice(FORMATS), default="onnx", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: the model's name]")
@click.option("--size", type=click.IntRange(min=1), metavar="PIXELS", help="Side of the images. [default: as trained]")
@click.option("--dynamic", callback=parse_dynamic, metavar="batch,size", help="What stays free: batch, size, or both.")
@click.option("--half", is_flag=True, help="Weights and arithmetic in float16.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Weights of MODEL from this file.")
@click.option("--random", is_flag=True, help="Random weights instead of the published ones, to try a format.")
def export(
    model: str,
    format_: str,
    out: Path | None,
    size: int | None,
    dynamic: tuple[str, ...],
    half: bool,
    weights: Path | None,
    random: bool,
) -> int:
    """Export MODEL, a model's name, a finished run or its export, and compare the result with PyTorch.

    \b
    tessel export cswin_tiny --dynamic batch
    tessel export runs/digits --format openvino --out digits.xml
    """
    from ..train.errors import UserError, report_errors

    with report_errors() as outcome:
        from ..export import export as export_module
        from ..predict import load

        predictor = load(model, device="cpu", weights=weights, size=size, pretrained=not random)
        network = predictor.model.network
        if not hasattr(network, "module"):
            raise UserError(f"{model} is an exported file already; give the run or the model that it was made of")
        path = out or default_path(model, format_)
        metadata = predictor.model.metadata()
        export_module(network.module, path, format=format_, size=size, dynamic=dynamic, half=half, metadata=metadata)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return outcome.code
