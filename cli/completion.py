"""`tessel completion`: the script with which a shell completes commands and options."""

import click
from click.shell_completion import get_completion_class


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
