"""The first examples of a batch, to stand for all of them in its statistics.

Batches are shuffled by whoever makes them, so that the first ``m`` examples are as good a sample as any other ``m``:
unbiased, the same in every run, a view of memory that is there, and nothing drawn from a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kronfac.likelihoods import Likelihood
from kronfac.measuring import couples_examples
from kronfac.sources.sample import Sample


@dataclass(frozen=True)
class Part:
    """The first ``examples`` of a batch of ``of``.

    Attributes:
        examples: ``m``, fewer than ``of``.
        of: ``N``, the examples of the batch.
        cut: Whether the recorded forward pass was of the whole batch, so that its samples are yet to be cut; otherwise
            it was of these examples alone.
    """

    examples: int
    of: int
    cut: bool

    def weight(self, likelihood: Likelihood) -> float:
        """What sums over the part are to be multiplied by, to stand for the whole batch; means need nothing.

        Args:
            likelihood: The loss.

        Returns:
            ``N/m`` under ``reduction="sum"``, else 1.
        """
        return self.of / self.examples if likelihood.reduction == "sum" else 1.0

    def begin(self, likelihood: Likelihood, outputs: Tensor, targets: object) -> Callable[[Sample], Sample]:
        """Prepare for the samples of one forward pass.

        Cut samples keep the first ``m/N`` of a layer's rows, wherever its first dimension is the batch or a multiple of
        it. Layers that keep no examples apart (a table of positions) are left with all of them, and so is batch norm in
        train mode, which would normalise the part by itself. Labels are those drawn for the whole batch, without which
        batch norm would pull back less than it should.

        Args:
            likelihood: The loss.
            outputs: The model's outputs, detached or not.
            targets: Targets, or None.

        Returns:
            A function of each sample.

        Raises:
            ValueError: The outputs' first dimension is no multiple of the batch, or no term of the part counts.
        """
        weight = self.weight(likelihood)
        if not self.cut:
            return lambda sample: replace(sample, weight=sample.weight * weight)
        batch = len(outputs)
        if batch % self.of:
            raise ValueError(
                f"The outputs' first dimension, {batch}, is no multiple of the batch of {self.of}, so that the first "
                f"{self.examples} examples cannot be told from the others. Keep the batch first."
            )
        rows = self._rows(batch)
        values = outputs.detach()[:rows]
        denominator = float(likelihood.denominator(values, first_of(targets, rows, batch)))
        if not denominator > 0:
            raise ValueError(f"No term of the first {self.examples} examples counts: all are masked or ignored.")

        def take(sample: Sample) -> Sample:
            if sample.output_moment is not None:
                raise ValueError(
                    "source='recursive' averages over the whole batch as it goes: the part of it that statistics are "
                    "of needs a forward of its own, by a loop that calls the model itself."
                )
            size = sample.layer.positions(sample.inputs)[0]
            if size % self.of or size != len(sample.inputs) or couples_examples(sample.layer.module):
                return sample
            kept = self._rows(size)
            return replace(
                sample,
                inputs=sample.inputs[:kept],
                cotangents=None if sample.cotangents is None else sample.cotangents[:kept],
                row_weights=None if sample.row_weights is None else sample.row_weights[:kept],
                weight=sample.weight * weight,
                denominator=denominator,
                batch=rows,
            )

        return take

    def _rows(self, size: int) -> int:
        return size // self.of * self.examples


def first_of(value: Any, count: int, batch: int) -> Any:
    """Cut an argument of a model or a loss to its first examples.

    Args:
        value: A tensor, a tuple, list or dictionary of arguments (targets with their mask), or anything else.
        count: How many examples to keep.
        batch: How many there are; tensors whose first dimension is another one stay as they are.

    Returns:
        Views of what was given.
    """
    return _cut(value, slice(count), batch)


def rest_of(value: Any, batch: int) -> Any:
    """Leave the first example out of an argument of a model or a loss.

    Args:
        value: As for :func:`first_of`.
        batch: How many examples there are.

    Returns:
        Views of what was given.
    """
    return _cut(value, slice(1, None), batch)


def _cut(value: Any, kept: slice, batch: int) -> Any:
    if isinstance(value, dict):
        return {key: _cut(part, kept, batch) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_cut(part, kept, batch) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value[kept] if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch else value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors among the arguments of a model or a loss.

    Args:
        value: A tensor, a tuple, list or dictionary of arguments, or anything else.

    Yields:
        The tensors, in the order in which they come.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)
