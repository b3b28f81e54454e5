"""The seam for approximations that couple layers: their statistics see all layers' samples of a pull together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from kronfac.approximations.base import Approximation, Mean, Statistic
from kronfac.blocks import CoupledBlocks
from kronfac.layers import LayerAdapter
from kronfac.sources import Sample, Source


class JointStatistic(ABC):
    """Statistics of all layers together.

    Args:
        layers: The layers' adapters by name.
    """

    def __init__(self, layers: Mapping[str, LayerAdapter]) -> None:
        self.layers = dict(layers)

    @abstractmethod
    def means(self) -> dict[str, Mean]:
        """The running means by name: what is decayed, saved and reduced over processes."""

    @abstractmethod
    def add(self, samples: Sequence[Sample]) -> None:
        """Take in one pull.

        Args:
            samples: A sample of every layer that the forward pass called, in the order of the calls.
        """

    @abstractmethod
    def blocks(self) -> CoupledBlocks:
        """Return what the statistics stand for, divided by the denominators gathered."""

    def check_graph(self, feeders: Mapping[str | None, set[str]]) -> None:  # noqa: B027  (most need no special form)
        """Refuse a network that is not of the form that this statistic assumes; called before the first `add`.

        Args:
            feeders: From which layers, directly, each layer takes its input; the outputs' entry is ``None``. Layers
                are in the order of their calls.
        """

    def decay(self, factor: float) -> None:
        """Forget: multiply sums and weights by ``factor``."""
        for mean in self.means().values():
            mean.decay(factor)

    @property
    def empty(self) -> bool:
        """Whether nothing was gathered."""
        return any(mean.weight == 0.0 for mean in self.means().values())


class JointApproximation(Approximation):
    """A family of matrices with blocks between layers.

    Attributes:
        blocks_alone: Name of the approximation that gives its diagonal blocks, for who looks at layers one by one.
    """

    needs_pairs = True
    needs_examples = True
    blocks_alone: str = "kfac"

    @abstractmethod
    def start_all(self, layers: Mapping[str, LayerAdapter]) -> JointStatistic:
        """Return empty statistics.

        Args:
            layers: The layers' adapters by name.
        """

    def start(self, layer: LayerAdapter) -> Statistic:
        """Refuse: there are no statistics of one layer alone.

        Args:
            layer: The layer's adapter.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"approximation={self.name!r} couples layers and has no statistics of layer {layer.name!r} alone; use "
            f"{self.blocks_alone!r}, which has the same diagonal blocks."
        )

    def check(self, source: Source) -> None:
        """Refuse a source without cotangents of all layers.

        Args:
            source: The source.

        Raises:
            ValueError: The two do not fit.
        """
        if not source.paired:
            raise ValueError(
                f"approximation={self.name!r} needs the cotangents of all layers together, which "
                f"source={source.name!r} does not offer; use source='sampled' or 'exact'."
            )


def require_per_layer(approximation: Approximation, what: str) -> None:
    """Refuse an approximation that couples layers, where they are taken one by one.

    Args:
        approximation: The approximation.
        what: Who takes layers one by one.

    Raises:
        ValueError: It couples layers.
    """
    if isinstance(approximation, JointApproximation):
        raise ValueError(
            f"{what} takes layers one by one, but approximation={approximation.name!r} couples them; use "
            f"{approximation.blocks_alone!r}, which has the same diagonal blocks, or kronfac.estimate for the whole."
        )


def whole_pulls(layers: Sequence[str], take: Callable[[Sequence[Sample]], None]) -> Callable[[Sample], None]:
    """Put the stream of samples together into pulls.

    Args:
        layers: The layers of a pull, in the order wanted.
        take: Called with the samples of each pull once they are complete.

    Returns:
        What takes the stream.
    """
    gathered: dict[str, Sample] = {}

    def receive(sample: Sample) -> None:
        gathered[sample.layer.name] = sample
        if len(gathered) == len(layers):
            pull = [gathered[name] for name in layers]
            gathered.clear()
            take(pull)

    return receive
