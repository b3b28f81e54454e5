"""Factors up to a width, and something cheaper for the layers that go beyond it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kronfac.approximations.base import Approximation, Statistic
from kronfac.approximations.diagonal import DiagonalBlocks
from kronfac.approximations.ekfac import takes_layers_alone
from kronfac.approximations.joint import JointApproximation
from kronfac.approximations.kfac import KFAC
from kronfac.layers import LayerAdapter
from kronfac.sources import Source
from kronfac.tape import Tape


class Limited(Approximation):
    """One approximation for layers whose factors are at most so wide, another for the rest.

    The output factor of a language model's head has the width of the vocabulary: ten gigabytes for 50,000 tokens, and
    hours to invert. ``Limited(8192)`` keeps such a layer's exact diagonal instead, and K-FAC for all others.  An
    embedding's input factor is a diagonal in any case and does not count.  :func:`kronfac.coverage` shows which layer
    gets what, and the memory, before training::

        kf.optim.KFAC(model, likelihood, lr=0.1, approximation=kf.approximations.Limited(8192))

    Args:
        width: Widest factor of ``base``; normalisation layers, whose blocks are small ones for each unit, do not count.
        base: What other layers get; K-FAC by default.
        wide: What layers with a wider factor get; the exact diagonal by default.

    Raises:
        TypeError: ``base`` or ``wide`` is no approximation, or couples layers.
        ValueError: ``width`` is no positive integer.
    """

    name = "limited"

    def __init__(self, width: int, base: Approximation | None = None, wide: Approximation | None = None) -> None:
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(f"width={width!r} must be a positive integer, the widest factor to keep.")
        self.width, self.base, self.wide = width, base or KFAC(), wide or DiagonalBlocks()
        for label, part in (("base", self.base), ("wide", self.wide)):
            if not isinstance(part, Approximation) or isinstance(part, JointApproximation):
                raise TypeError(
                    f"{label} must be a kronfac.approximations.Approximation that takes layers one by one, such as "
                    f"KFAC() or DiagonalBlocks(), not {part!r}."
                )
        parts = (self.base, self.wide)
        self.needs_pairs = any(part.needs_pairs for part in parts)
        self.needs_examples = any(part.needs_examples for part in parts)
        self.needs_cotangents = any(part.needs_cotangents for part in parts)
        self.passes = max(part.passes for part in parts)
        self.keeps_trace = all(part.keeps_trace for part in parts)
        self.couples_examples = all(part.couples_examples for part in parts)
        self.whole_batches = any(part.whole_batches for part in parts)

    def is_wide(self, layer: LayerAdapter) -> bool:
        """Whether a layer goes beyond the width.

        Args:
            layer: The layer's adapter.

        Returns:
            True if so.
        """
        widths = (layer.d_out, 0 if layer.diagonal_input else layer.d_in)
        return not layer.unit_wise and max(widths) > self.width

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty statistics of the one or the other kind.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        return (self.wide if self.is_wide(layer) else self.base).start(layer)

    def begin(
        self, model: nn.Module, source: Source, tape: Tape, outputs: Tensor, statistics: Mapping[str, Statistic]
    ) -> None:
        """Let each part look at its own layers.

        Args:
            model: The model.
            source: Whence the cotangents will come.
            tape: The recorded layers.
            outputs: The model's outputs.
            statistics: Those of the model's layers.

        Raises:
            ValueError: A part that reads the graph of all layers does not get all of them.
        """
        for part, wide in ((self.base, False), (self.wide, True)):
            own = {name: s for name, s in statistics.items() if self.is_wide(s.layer) is wide}
            if len(own) < len(statistics) and not takes_layers_alone(part):
                raise ValueError(
                    f"Limited({self.width}) gives layers {[name for name in statistics if name not in own]} to another "
                    f"part than approximation={part.name!r}, which reads the graph of all layers and can leave none "
                    "out: use one approximation for all of them."
                )
            part.begin(model, source, tape, outputs, own)

    def check(self, source: Source) -> None:
        """Refuse a source that does not offer what one of the parts needs.

        Args:
            source: The source.

        Raises:
            ValueError: The two do not fit.
        """  # noqa: DOC502
        self.base.check(source)
        self.wide.check(source)
