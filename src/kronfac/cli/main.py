"""The entry point. The application is built on first use, so that a missing library is one clear line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    app: typer.Typer


def main() -> None:
    """Run ``kronfac`` with the arguments of this process; exits with 0, or 2 for bad input, or 130 on Ctrl-C."""
    try:
        from kronfac.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kronfac"):
            raise
        print(
            f"kronfac: error: the command line needs {error.name}; install it with: pip install 'kronfac[experiments]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="kronfac")


def __getattr__(name: str) -> object:
    """Build ``app`` on first use."""
    if name == "app":
        from kronfac.cli.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
