"""The command line: the only place of jaxedit that prints. Entry point: `main`."""

import jaxedit.cli.commands
import jaxedit.cli.ledger
import jaxedit.cli.locate
import jaxedit.cli.metrics
import jaxedit.cli.shipping
import jaxedit.cli.spread  # noqa: F401  (importing them adds the subcommands)
from jaxedit.cli.app import app, main

__all__ = ["app", "main"]
