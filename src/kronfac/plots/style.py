"""One look for every picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours that people with the common forms of colour blindness tell apart (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
#: Styles of lines, one for each round of colours.
LINES = ("-", "--", "-.", ":")


def colour_of(name: str, names: Sequence[str]) -> str:
    """Give a name the colour of its place in a list.

    Args:
        name: The name.
        names: All names of the picture, in order.

    Returns:
        A colour; they repeat after the seventh name.
    """
    return COLOURS[list(names).index(name) % len(COLOURS)]


def line_of(name: str, names: Sequence[str]) -> str:
    """Give a name the line style of its place in a list, so that names that share a colour are told apart.

    Args:
        name: The name.
        names: All names of the picture, in order.

    Returns:
        A style of matplotlib's; the next one after each round of colours.
    """
    return LINES[list(names).index(name) // len(COLOURS) % len(LINES)]


def new_axes(width: float = 6.4, height: float = 4.2) -> Axes:
    """Make a figure with one pair of axes, without touching pyplot's state or any display.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        The axes; ``axes.figure.savefig(path)`` writes the picture.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("kronfac.plots needs matplotlib: pip install 'kronfac[experiments]'") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained").add_subplot()


def dress(axes: Axes, title: str | None, x: str, y: str) -> Axes:
    """Label axes and clear away what carries no information.

    Args:
        axes: The axes.
        title: Title, if any.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.

    Returns:
        The same axes.
    """
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def label(column: str) -> str:
    """Word a column for people.

    Args:
        column: Its name.

    Returns:
        The label.
    """
    words = {"step": "steps", "epoch": "epochs", "seconds": "seconds of training"}
    text = column.replace("train_", "training ").replace("_", " ")
    return words.get(column, text + " [%]" if column.endswith("_error") and "squared" not in column else text)


def plain_logarithms(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """Write plain numbers on a logarithmic axis, as many as help to read it.

    Args:
        axes: The axes, changed in place; their limits should be final.
        which: Which of the two axes; the vertical one by default.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    if high / low < 5:  # hardly curved: round numbers at equal distances
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low >= 100 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
