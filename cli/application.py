"""The command `tessel`: its subcommands, and how it ends."""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata

import click

from .. import __version__
from .compare import compare
from .completion import completion
from .explain import explain
from .export import export
from .forwarded import check, evaluate, kernels, report, train
from .group import InOrder
from .info import info
from .listing import listing
from .predict import predict
from .probe import probe
from .weights import weights

EPILOG = "`tessel COMMAND --help` explains a command. On several GPUs: torchrun --nproc-per-node 8 -m tessel train ..."


@click.group(
    cls=InOrder, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="tessel")
def tessel() -> None:
    """Vision backbones: choose, predict, train, evaluate, export."""


for command in (
    listing,
    info,
    predict,
    explain,
    compare,
    probe,
    export,
    weights,
    train,
    evaluate,
    report,
    check,
    kernels,
    completion,
):
    tessel.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code: 0, 1 after an error, 2 for wrong arguments, 130 after Ctrl-C.

    Errors that a user can fix are printed as one line on stderr.
    """
    if sys.platform == "darwin":
        from ..train.system import allow_cpu_operators

        allow_cpu_operators()
    try:
        code = tessel.main(None if argv is None else list(argv), prog_name="tessel", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = _extra_with(error.name or "")
        if extra is None:
            raise
        print(f"error: {error.name} is not installed; pip install 'tessel[{extra}]' installs it", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def _extra_with(module: str) -> str | None:
    """The extra of this package that installs the top-level `module`; None if none does."""
    packages = {"sklearn": "scikit-learn", "yaml": "pyyaml", "mmcv": "mmcv-lite", "mmseg": "mmsegmentation"}
    wanted = packages.get(top := module.partition(".")[0], top).replace("_", "-").lower()
    try:
        requirements = metadata("tessel").get_all("Requires-Dist") or []
    except PackageNotFoundError:  # a checkout that was not installed
        return None
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        name = package.strip().lower()
        if name.startswith(wanted) and not name[len(wanted) :].lstrip()[:1].isalnum() and "extra ==" in marker:
            return marker.split("extra ==")[1].strip(" \"'")
    return None
