"""Running commands in this process."""

from typer.testing import CliRunner

from jaxedit.cli import app


def run_command(*arguments, code=0):
    """Run `jaxedit` with arguments; the result's stdout, stderr and exit_code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def words(text: str) -> str:
    return " ".join(text.split())
