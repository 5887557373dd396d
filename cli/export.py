"""`tessel export`: a model in the format of another runtime."""

from pathlib import Path

import click

from .completion import complete_models

# of tessel.export.formats(), which imports torch
FORMATS = ("onnx", "torch-export", "aoti", "openvino", "executorch", "torchscript-trace")
DYNAMIC = ("batch", "size")


def parse_dynamic(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    if text is None or text == "none":
        return None if text is None else ()
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in DYNAMIC]:
        raise click.BadParameter(f"{unknown[0]!r} is none of batch, size, none")
    return names


def default_path(model: str) -> Path:
    """A file in the current folder, named after the model or the run; the format's suffix is appended."""
    folder = Path(model).resolve()
    if folder.exists():
        return Path(folder.parent.name if folder.name == "export" else folder.name)
    return Path(model.replace("/", "_").replace(":", "_"))


@click.command(short_help="Export a model to ONNX and other formats, and compare it.")
@click.argument("model", shell_complete=complete_models)
@click.option("--format", "format_", type=click.Choice(FORMATS), default="onnx", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: the model's name]")
@click.option("--size", type=click.IntRange(min=1), metavar="PIXELS", help="Side of the images. [default: as trained]")
@click.option(
    "--dynamic",
    callback=parse_dynamic,
    metavar="batch,size|none",
    help="What stays open: batch, size, both, none. [default: all that the format can leave open]",
)
@click.option("--half", is_flag=True, help="Weights and arithmetic in float16.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Weights of MODEL from this file.")
@click.option("--random", is_flag=True, help="Random weights instead of the published ones, to try a format.")
def export(
    model: str,
    format_: str,
    out: Path | None,
    size: int | None,
    dynamic: tuple[str, ...] | None,
    half: bool,
    weights: Path | None,
    random: bool,
) -> int:
    """Export MODEL, a model's name, a finished run or its export. The file is run at once and compared with PyTorch.

    It carries the names of the classes and the preprocessing: `tessel predict FILE IMAGE` works with it.

    \b
    tessel export cswin_tiny --dynamic batch
    tessel export runs/digits --format openvino --out digits.xml
    """
    from ..train.errors import UserError, report_errors

    with report_errors() as outcome:
        from ..export import BatchDetector, ExportError, OneImageDetector
        from ..export import export as export_module
        from ..predict import load

        predictor = load(model, device="cpu", weights=weights, pretrained=not random)
        network = predictor.model.network
        if not hasattr(network, "module"):
            raise UserError(f"{model} is an exported file; give the run or the model that it was made of")
        try:
            module = network.module
            if predictor.task == "detect":
                module = (BatchDetector if hasattr(module, "batched") else OneImageDetector)(module)
            report = export_module(
                module,
                out or default_path(model),
                format=format_,
                size=size or getattr(predictor.model, "size", None),
                dynamic=dynamic,
                half=half,
                metadata=predictor.model.metadata(),
            )
        except (ExportError, ValueError, OSError) as error:
            raise UserError(str(error)) from error
        print(report)
    return outcome.code
