"""How the statistics of a sub-batch are had from a training forward: by a forward of their own, or by cutting.

A pull through the graph of the whole batch costs the same whatever part of the cotangents is zero or dropped; cutting
saves moments alone. A forward of ``m`` of ``N`` examples pulls those alone and costs ``m/N`` of everything, itself
included. Over forward+backward, by processor time (``python benchmarks/sub_batch_ways.py``):

    ===========  =========  ====  ================  ================  ================
    extra        all of it  pull  1/8: apart, cut   1/4: apart, cut   1/2: apart, cut
    ===========  =========  ====  ================  ================  ================
    autoencoder  0.85       0.27  0.22, 0.42        0.36, 0.49        0.64, 0.59
    KFC network  0.72       0.19  0.23, 0.33        0.35, 0.37        0.63, 0.48
    ResNet-20    1.36       0.49  0.28, 0.77        0.44, 0.86        0.88, 1.02
    ===========  =========  ====  ================  ================  ================

so that fewer than half of the examples get a forward of their own and others are cut. Cut they are, too, where the part
would see another function than the whole, which is batch norm in train mode, and where the forward is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kronfac.estimator import Estimator
from kronfac.measuring import couples_examples
from kronfac.sources.part import Part, first_of, tensors_of
from kronfac.tape import TapeError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: What may be passed on to a forward of fewer examples as it is.
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Plan:
    """How the statistics of a training forward are had, decided before it.

    Attributes:
        examples: How many examples they are of at most; None for all.
        batch: How many there are: the first dimension of the first tensor that the model takes; None where that is
            hidden, and the outputs will tell.
        part: Which part they are of; None for all, and where the outputs will tell.
        arguments: Positional and keyword arguments of the forward.
        versions: Versions of the tensors among them.
    """

    examples: int | None
    batch: int | None
    part: Part | None
    arguments: Arguments
    versions: tuple[int, ...]

    @classmethod
    def of(cls, examples: int | None, estimator: Estimator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        """Plan for a forward.

        Args:
            examples: How many examples at most; None for all.
            estimator: Takes the statistics.
            args: Positional arguments of the model.
            kwargs: Keyword arguments.

        Returns:
            The plan.
        """
        values = (*args, *kwargs.values())
        batch = next((len(v) for v in values if isinstance(v, Tensor) and v.ndim > 0), None)
        part = None
        if examples is not None and batch is not None and examples < batch:
            source = estimator.source
            # The recursion's moments cannot be cut, and inputs alone are cut at no cost.
            fewer = source.name == "recursive" or (2 * examples < batch and source.name != "forward_only")
            seen = all(isinstance(v, (Tensor, *PLAIN)) for v in values)
            part = Part(examples, batch, cut=not (fewer and seen) or couples_examples(estimator.model))
        return cls(examples, batch, part, (args, kwargs), versions_of(args, kwargs))

    @property
    def apart(self) -> bool:
        """Whether the part takes a forward of its own."""
        return self.part is not None and not self.part.cut

    def part_of(self, outputs: Tensor) -> Part | None:
        """Which part of the forward statistics are of.

        Args:
            outputs: The outputs.

        Returns:
            The part, or None for all.
        """
        return self.part if self.batch is not None else part_of(self.examples, outputs)

    def inputs(self) -> Arguments:
        """Arguments of another forward for the statistics.

        Returns:
            Positional and keyword arguments, cut to the part where it takes a forward of its own.
        """
        self.check_inputs()
        if self.part is None or self.part.cut:
            return self.arguments
        args, kwargs = first_of(self.arguments, self.part.examples, self.part.of)
        return args, kwargs

    def check_inputs(self) -> None:
        """Refuse a model that changes its arguments in place.

        Raises:
            TapeError: A forward did.
        """
        if versions_of(*self.arguments) != self.versions:
            raise TapeError(
                "The model changes its input in place, so that a second forward of it for the statistics would see "
                "another one; clone the input first."
            )

    def check(self, outputs: Tensor, whole: Tensor) -> None:
        """Refuse outputs of a part that are not those of as many examples.

        Args:
            outputs: Outputs of the other forward.
            whole: Those of the training forward.

        Raises:
            TapeError: They are not.
        """
        part = self.part
        if part is not None and len(outputs) * part.of != len(whole) * part.examples:
            raise TapeError(
                f"A second forward for the statistics, of {part.examples} out of {part.of}, gave {len(outputs)} rows "
                f"of outputs, and the training forward {len(whole)}: keep the batch first, in the inputs and in the "
                "outputs."
            )


def check_fits(examples: int | None, estimator: Estimator) -> None:
    """Refuse sub-batches for statistics that only whole batches have.

    Args:
        examples: The option.
        estimator: Takes the statistics.

    Raises:
        ValueError: They do not fit.
    """
    if examples is not None and estimator.approximation.whole_batches:
        raise ValueError(
            f"stats_examples={examples} does not fit approximation={estimator.approximation.name!r}, whose statistics "
            "are of all pairs of examples of a batch."
        )


def part_of(examples: int | None, outputs: Tensor) -> Part | None:
    """Which part of a forward statistics are of, where nothing but its outputs is known.

    Args:
        examples: How many examples at most; None for all.
        outputs: The outputs, batch first.

    Returns:
        The part, or None for the whole batch.
    """
    return None if examples is None or examples >= len(outputs) else Part(examples, len(outputs), cut=True)


def versions_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Versions of the tensors among a forward's arguments, which every change in place raises.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        Those of tensors that have one.
    """
    return tuple(tensor._version for tensor in tensors_of((args, kwargs)) if not tensor.is_inference())
