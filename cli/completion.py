"""`tessel completion`, and what a shell offers for an argument; without importing torch."""

import re
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

ROOT = Path(__file__).resolve().parents[1]


def complete_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Models with published weights, with and without the tag, recipes with published weights, and files."""
    folder = ROOT / "checkpoints"
    tables = "".join((folder / file).read_text(encoding="utf-8") for file in ("manifest.toml", "dense.toml"))
    names = re.findall(r'^\["(([^."]+)[^"]*)"\]', tables, re.MULTILINE)
    return _offered({name for pair in names for name in pair}, incomplete)


def complete_recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The packaged recipes, and files."""
    folder = ROOT / "configs"
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    return _offered(names, incomplete)


def _offered(names: set[str], incomplete: str) -> list[CompletionItem]:
    # the last item makes the shell complete files too
    offered = [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
    return [*offered, CompletionItem(incomplete, type="file")]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: eval "$(tessel completion bash)"    in ~/.bashrc
    zsh:  eval "$(tessel completion zsh)"     in ~/.zshrc
    fish: tessel completion fish | source     in ~/.config/fish/config.fish
    """
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(context.find_root().command, {}, "tessel", "_TESSEL_COMPLETE").source())
