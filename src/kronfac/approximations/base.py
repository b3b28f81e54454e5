"""Which statistics of the pairs of input and cotangent are kept, and what block they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kronfac import processes
from kronfac.blocks import Block
from kronfac.layers import LayerAdapter
from kronfac.linalg.symmetric import all_finite, with_even_rows
from kronfac.sources import Sample, Source, not_finite
from kronfac.tape import Tape

#: Least scale of a sum that is added to: far from under- and overflow in float32.
_LEAST = 1e-6
#: Least scale of one that is not: less than rounding of float64 beside a new batch.
_NOTHING = 1e-18


class Mean:
    """A running mean that carries its own weight: plain means and bias-corrected averages are one thing.

    Sum and weight are both multiplied by :meth:`decay`, so that their ratio is the exponential moving average with the
    right start (Kingma & Ba 2015, section 3) and any mini-batch sizes.  The sum is ``scale · total``: decaying it
    touches one number instead of the whole tensor, and what is added is divided by the scale.  A mean to which nothing
    is added, however long, stays what it is.

    Args:
        total: Zeros of the statistic's shape; those of :func:`blank` until something is added.
    """

    def __init__(self, total: Tensor) -> None:
        self.total = total
        self.weight = 0.0
        self.scale = 1.0

    @property
    def alpha(self) -> float:
        """Factor of whatever is added to :attr:`total`, which is to be asked for before."""
        if self.scale < _LEAST:
            if not is_blank(self.total):
                self.total.mul_(self.scale)
            self.scale = 1.0
        return 1.0 / self.scale

    def decay(self, factor: float) -> None:
        """Multiply what was gathered so far by ``factor``."""
        # Next to what may come, what was left alone for so long is nothing; by itself it is still a mean.
        factor = max(factor, _NOTHING / self.scale)
        self.scale *= factor
        self.weight *= factor

    def reset(self) -> None:
        """Forget everything, without a trace."""
        if not is_blank(self.total):
            self.total.zero_()
        self.weight, self.scale = 0.0, 1.0

    def value(self) -> Tensor:
        """Return the mean over all processes, a new tensor: sums and weights are reduced, never averages averaged."""
        total, scale = self.parts()
        return total * scale if total is self.total else total

    def parts(self) -> tuple[Tensor, float]:
        """Return two factors of :meth:`value`, the first of which is the sum itself outside of distributed runs."""
        if not processes.together():
            return self.total, self.scale / self.weight
        total, weight = self.total * self.scale, self.total.new_tensor(self.weight, dtype=torch.float64)
        processes.add_up(total)
        processes.add_up(weight)
        return total.div_(weight.item()), 1.0

    def consolidate(self) -> None:
        """Give every process of a distributed run the same share of the sums; :meth:`value` stays what it is."""
        if not processes.together():
            return
        weight = self.total.new_tensor(self.weight, dtype=torch.float64)
        if is_blank(self.total):  # another process may have added to its own
            self.total = self.total.contiguous()
        self.total.mul_(self.scale)
        total = self.total.contiguous()
        processes.add_up(total)
        processes.add_up(weight)
        self.total.copy_(total.div_(processes.count()))
        self.weight, self.scale = weight.item() / processes.count(), 1.0


class Statistic(ABC):
    """Statistics of one layer.

    Args:
        layer: The layer's adapter.

    Attributes:
        keeps_basis: Whether blocks differ in their eigenvalues alone between two calls of :meth:`rebase`, so that new
            inverses are cheap.
        by_rows: Names of the means over rows; the others are divided by the loss's denominators.
    """

    keeps_basis: bool = False
    by_rows: frozenset[str] = frozenset()

    def __init__(self, layer: LayerAdapter) -> None:
        self.layer = layer

    @abstractmethod
    def means(self) -> dict[str, Mean]:
        """The running means by name: what is decayed, saved and reduced over processes."""

    @abstractmethod
    def add(self, sample: Sample) -> None:
        """Take in one sample.

        Args:
            sample: Input and cotangent of one pull.
        """

    @abstractmethod
    def block(self) -> Block:
        """Return what the statistics stand for, divided by the denominators gathered."""

    @property
    def drafts(self) -> bool:
        """Whether :meth:`draft` takes next to no memory."""
        return False

    def draft(self) -> Block:
        """Return :meth:`block` for use before the statistics change: it may be made of them, and hold NaN or Inf."""
        return self.block()

    def decay(self, factor: float) -> None:
        """Forget: multiply sums and weights by ``factor``."""
        for mean in self.means().values():
            mean.decay(factor)

    def count_absence(self, denominator: float) -> None:
        """Count terms of the loss for which the forward did not call the layer: their gradients are zero.

        Args:
            denominator: Of these terms.
        """
        for name, mean in self.means().items():
            if name not in self.by_rows and mean.weight:
                mean.weight += denominator

    def rebase(self) -> None:  # noqa: B027  (most statistics have nothing to renew)
        """Renew what is costly and fixed in between, an eigenbasis; called before blocks are inverted anew."""

    def next_pass(self) -> None:  # noqa: B027  (most statistics need one pass)
        """Prepare for another pass over the same data; see :attr:`Approximation.passes`."""

    def constants(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the means, by name: what :meth:`rebase` made, nothing before it."""
        return {}

    def constant_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the :meth:`constants` once they are there."""
        return {}

    def restore(self, constants: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`constants` gave.

        Args:
            constants: Tensors of :meth:`constant_shapes`, or none.
        """
        assert not constants

    @property
    def empty(self) -> bool:
        """Whether nothing was gathered."""
        return any(mean.weight == 0.0 for mean in self.means().values())


class Approximation(ABC):
    """A family of blocks.

    Attributes:
        name: The name in the public face.
        needs_pairs: Whether samples must pair each input with its cotangent.
        needs_examples: Whether a layer's rows must be those of single examples.
        needs_cotangents: Whether it cannot do without cotangents.
        passes: How often :func:`kronfac.estimate` reads the data; :meth:`Statistic.next_pass` is called in between.
        keeps_trace: Whether every block has the trace of the exact one, or K-FAC's own factors: what `verify` checks.
        couples_examples: Whether its blocks know of the examples that batch norm in train mode couples.
        whole_batches: Whether it needs all pairs of examples of a batch, for which a part of it cannot stand.
    """

    name: str
    needs_pairs: bool = False
    needs_examples: bool = False
    needs_cotangents: bool = True
    passes: int = 1
    keeps_trace: bool = True
    couples_examples: bool = False
    whole_batches: bool = False

    @abstractmethod
    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty statistics for a layer.

        Args:
            layer: The layer's adapter.
        """

    def begin(  # noqa: B027  (most look at layers alone)
        self, model: nn.Module, source: Source, tape: Tape, outputs: Tensor, statistics: Mapping[str, Statistic]
    ) -> None:
        """Look at a recorded forward pass before its samples come, and refuse it where it does not fit.

        Args:
            model: The model.
            source: Whence the cotangents will come.
            tape: The recorded layers.
            outputs: The model's outputs, attached to the graph.
            statistics: Those of the model's layers.
        """

    def check(self, source: Source) -> None:
        """Refuse a source that does not offer what this approximation needs.

        Args:
            source: The source.

        Raises:
            ValueError: The two do not fit.
        """
        if self.needs_pairs and not source.paired:
            raise ValueError(
                f"approximation={self.name!r} needs paired statistics of inputs and cotangents, which "
                f"source={source.name!r} does not offer; use source='sampled' or 'exact'."
            )


def statistics_dtype(layer: LayerAdapter) -> torch.dtype:
    """Float64 for float64 layers, else float32: never less."""
    parameter = next(iter(layer.parameters.values()))
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def zeros(layer: LayerAdapter, *shape: int) -> Tensor:
    """Zeros on the layer's device in the statistics' dtype, in memory that products are added to fast."""
    parameter = next(iter(layer.parameters.values()))
    return with_even_rows(torch.zeros(shape, dtype=statistics_dtype(layer), device=parameter.device))


def blank(layer: LayerAdapter, *shape: int) -> Tensor:
    """Zeros that take no memory, for a sum that may never be needed; they cannot be added to."""
    return zeros(layer).expand(shape)


def is_blank(total: Tensor) -> bool:
    """Whether these are zeros of :func:`blank`."""
    return total.ndim > 0 and not any(total.stride())


def require_finite(sample: Sample) -> None:
    """Stop before a NaN or an infinity enters the running means; the source looked at the inputs.

    Args:
        sample: The sample.

    Raises:
        FloatingPointError: The cotangent of the layer is not finite.
    """
    if not (sample.checked or sample.cotangents is None or all_finite(sample.cotangents)):
        raise FloatingPointError(not_finite("cotangent", sample.layer.name))


def require_no_moment(sample: Sample) -> None:
    """Refuse a moment without cotangents, where each example's gradient is needed.

    Args:
        sample: The sample.

    Raises:
        ValueError: The source has averaged already.
    """
    if sample.output_moment is not None:
        raise ValueError(
            f"The block of layer {sample.layer.name!r} needs each example's gradient; the source gave averages only. "
            "Use source='sampled' or 'exact'."
        )
