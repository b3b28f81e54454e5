"""What a figure is: the commands that make it, at the paper's scale and small."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A figure or a table of a paper, and the commands of ``kronfac`` that make ours.

    Attributes:
        key: What it is asked for by, such as ``"gao-4"``.
        paper: Authors and year.
        where: Its number or numbers in the paper.
        shows: What it shows, in a line.
        found: What the paper reports there.
        commands: Commands without ``kronfac`` and ``--out``, with the paper's settings as far as they are known.
        small: The same on the offline digits, in seconds: to see what comes out, not to compare with the paper.
        differs: Where ours differs from the paper's.
    """

    key: str
    paper: str
    where: str
    shows: str
    found: str
    commands: tuple[str, ...]
    small: tuple[str, ...]
    differs: str

    def arguments(self, small: bool) -> list[list[str]]:
        """Split the commands into words.

        Args:
            small: Those on the digits.

        Returns:
            The arguments of each command.
        """
        return [shlex.split(command) for command in (self.small if small else self.commands)]
