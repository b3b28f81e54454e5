"""Names there are, for help texts."""

from __future__ import annotations

from kronfac.experiments.optimizers import OPTIMIZERS
from kronfac.experiments.optimizers.options import COMMON
from kronfac.experiments.problems import PROBLEMS


def problems() -> str:
    """List the problems.

    Returns:
        Paragraphs in rich markup.
    """
    return "[bold]Problems[/bold]\n\n" + "\n\n".join(f"{p.name}: {p.description}" for p in PROBLEMS.values())


def optimizers() -> str:
    """List the optimisers with their hyper-parameters.

    Returns:
        Paragraphs in rich markup.
    """
    own = [f"{s.name}: {', '.join(option.name for option in s.options)}" for s in OPTIMIZERS.values()]
    shared = [f"every optimiser: {', '.join(option.name for option in COMMON)}"]
    return "[bold]Optimisers and their hyper-parameters[/bold]\n\n" + "\n\n".join(own + shared)
