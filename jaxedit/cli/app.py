"""The command ``jaxedit`` itself, to which `jaxedit.cli.commands` adds the subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from jaxedit.cli.console import Commands, out

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main():
    """Entry point of the command ``jaxedit``."""
    app()


def _version(asked: bool):
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        out.print(f"jaxedit {version('jaxedit')} (jax {version('jax')})")
    except PackageNotFoundError:
        out.print("jaxedit, not installed as a package")
    raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
):
    """Edit the knowledge of large language models, in JAX.

    \b
    Examples:
      jaxedit demo
      jaxedit edit smollm2-135m facts.jsonl --out edited --patch facts.jaxedit
    """
