"""The command line as a function."""

from __future__ import annotations

from typer.testing import CliRunner

from kronfac.cli.main import app


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr
