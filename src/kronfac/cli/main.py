"""The entry point. The application is built on first use, so that a missing library is one clear line."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    app: typer.Typer


def main() -> None:
    """Run ``kronfac`` with the arguments of this process; exits with 0, or 2 for bad input, or 130 on Ctrl-C."""
    _replace_what_cannot_be_written()
    try:
        with _quiet_ctrl_c():
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


@contextlib.contextmanager
def _quiet_ctrl_c() -> Iterator[None]:
    """Leave at once on Ctrl-C: nothing was begun, so that there is nothing to say.

    An exception would not do: torch swallows those that are raised while it loads numpy, and goes on with half of it.

    Yields:
        Nothing.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield  # whoever started this process has decided otherwise, as nohup does
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _replace_what_cannot_be_written() -> None:
    """Have streams write ``?`` for what their encoding lacks, such as ± in ASCII: an error would come after training.

    Standard error of a usual process has a way of its own already, and streams put in place by others may have none.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        whole = codecs.lookup(stream.encoding).name == "utf-8"  # which then lacks nothing that can be in a path
        if stream.errors == "strict" or (stream.errors == "surrogateescape" and not whole):
            stream.reconfigure(errors="replace")


def __getattr__(name: str) -> object:
    """Build ``app`` on first use."""
    if name == "app":
        from kronfac.cli.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
