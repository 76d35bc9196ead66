"""The command line: the only place of jaxedit that prints. Entry point: `main`."""

from jaxedit.cli.commands import app, main

__all__ = ["app", "main"]
