"""How every command ends: errors of the user and of the disk are one line on standard error and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from kronfac.experiments.errors import ExperimentError

BAD_INPUT, INTERRUPTED = 2, 130
#: The commands that keep what they have done; so does ``bench --scaling``, if it has a folder.
_RESUMABLE = (
    "train",
    "compare",
    "sweep",
    "demo",
    "continual",
    "analyse table",
    "reproduce kld-wrm",
    "reproduce figure",
)


class OneLineErrors(TyperGroup):
    """A group of commands that words bad input as one line, without a usage screen or a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run a command and leave the process.

        Args:
            args: The arguments; those of the process by default.
            prog_name: How the program is called in help texts.
            complete_var: As in typer.
            standalone_mode: Ignored: errors are always handled here.
            windows_expand_args: As in typer.
            **extra: As in typer.
        """
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except ExperimentError as error:
            _fail(str(error))
        except OSError as error:  # a full disk, or a folder that somebody has removed
            _fail(str(error))
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except Exception as error:
            word = getattr(error, "format_message", None)  # what typer raises for bad usage; it exports no base class
            if word is None:
                raise
            _fail(word())
        if code == INTERRUPTED:  # recent versions of typer turn Ctrl-C into this code, older ones into Abort
            print(how_to_go_on(sys.argv[1:] if args is None else args), file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)


def how_to_go_on(arguments: Sequence[str]) -> str:
    """Say what is left of a command that was stopped.

    Args:
        arguments: Its arguments.

    Returns:
        One line.
    """
    options = {argument.partition("=")[0] for argument in arguments}
    kept = any(" ".join(arguments[:count]) in _RESUMABLE for count in (1, 2))
    if not kept and not (list(arguments[:1]) == ["bench"] and {"--scaling", "--out"} <= options):
        return "stopped"
    if "--fresh" in options:  # which would throw away what there is once more
        return "stopped; the same command without --fresh goes on from the last checkpoint"
    return "stopped; the same command goes on from the last checkpoint"


def _fail(message: str) -> NoReturn:
    print(f"kronfac: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
