"""The command line: the only place of jaxedit that prints. Entry point: `main`."""

import jaxedit.cli.commands  # noqa: F401  (adds the subcommands)
from jaxedit.cli.app import app, main

__all__ = ["app", "main"]
