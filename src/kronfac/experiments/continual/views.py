"""The weights of a network that a penalty acts on, and what batch norm does meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from kronfac import continual
from kronfac.continual import MergedBatchNorm
from kronfac.continual.base import Parameters
from kronfac.continual.statistics import TrackedStatistics


class View:
    """The network's own parameters, batch norm in train mode: what one does who gives batch norm no thought."""

    @contextmanager
    def learning(self, model: nn.Module, inputs: Sequence[Tensor], later: bool) -> Iterator[None]:
        """Go around the training of a task.

        Args:
            model: The live network, in train mode.
            inputs: Batches of the new task's inputs.
            later: Whether a task was learned before.

        Yields:
            Nothing.
        """
        yield

    def live(self, model: nn.Module) -> Parameters:
        """Give what the penalty is evaluated on.

        Args:
            model: The live network.

        Returns:
            The network, or tensors by parameter name.
        """
        return model

    def subject(self, model: nn.Module) -> nn.Module:
        """Give what curvature is estimated on.

        Args:
            model: The network at a task's optimum, in train mode.

        Returns:
            A network with the view's parameters.
        """
        return model

    def anchor(self, model: nn.Module) -> Parameters:
        """Give the view's parameters outside training.

        Args:
            model: The network at a task's optimum.

        Returns:
            The network, or tensors by parameter name.
        """
        return model


class FixedView(View):
    """Batch norm in eval mode from the second task on, with the statistics of the first."""

    @contextmanager
    def learning(self, model: nn.Module, inputs: Sequence[Tensor], later: bool) -> Iterator[None]:
        """Put batch norm into eval mode for every task but the first.

        Args:
            model: The live network, in train mode.
            inputs: Unused.
            later: Whether a task was learned before.

        Yields:
            Nothing.
        """
        if later:
            _freeze(model)
        yield

    def subject(self, model: nn.Module) -> nn.Module:
        """Give a copy in eval mode.

        Args:
            model: The network at a task's optimum.

        Returns:
            The copy.
        """
        return copy.deepcopy(model).eval()


class MergedView(View):
    """Weights merged with batch norm; each task begins with the old function under its own statistics, and keeps them.

    Networks without batch norm are seen as they are.
    """

    def __init__(self) -> None:
        self._merged: MergedBatchNorm | None = None
        self._statistics: TrackedStatistics | None = None  # None: the running ones

    @contextmanager
    def learning(self, model: nn.Module, inputs: Sequence[Tensor], later: bool) -> Iterator[None]:
        """Take the new task's statistics, the function kept, and put batch norm into eval mode.

        Args:
            model: The live network, in train mode.
            inputs: Batches of the new task's inputs.
            later: Whether a task was learned before.

        Yields:
            Nothing.
        """
        if not (later and _norms(model)):
            yield
            return
        self._merged = _restandardised(model, inputs)
        _freeze(model)
        yield
        self._merged = None

    def live(self, model: nn.Module) -> Parameters:
        """Give the merged weights.

        Args:
            model: The live network.

        Returns:
            Tensors by parameter name.
        """
        return model if self._merged is None else self._merged.parameters(self._statistics)

    def subject(self, model: nn.Module) -> nn.Module:
        """Give a copy with merged weights.

        Args:
            model: The network at a task's optimum.

        Returns:
            The copy.
        """
        return continual.merge_batchnorm(model).folded() if _norms(model) else model

    def anchor(self, model: nn.Module) -> Parameters:
        """Give the weights merged with running statistics, which decide the function in eval mode.

        Args:
            model: The network at a task's optimum.

        Returns:
            Tensors by parameter name.
        """
        return continual.merge_batchnorm(model).parameters() if _norms(model) else model


class LiveView(MergedView):
    """Weights merged with batch norm, which stays in train mode.

    With the statistics of each batch, or with running ones, the penalty would pull at noise or at what lags behind; it
    sees those that `MergedBatchNorm.tracked` gives.

    Args:
        coupled: Estimate curvature in train mode, where examples act on each other, instead of in eval mode.
    """

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self._coupled = coupled

    @contextmanager
    def learning(self, model: nn.Module, inputs: Sequence[Tensor], later: bool) -> Iterator[None]:
        """Begin with the old function under the new task's statistics, and end with those of the weights learned.

        Args:
            model: The live network, in train mode.
            inputs: Batches of the new task's inputs.
            later: Whether a task was learned before.

        Yields:
            Nothing.
        """
        if not _norms(model):
            yield
            return
        if later:
            self._merged = _restandardised(model, inputs)
            with self._merged.tracked() as self._statistics:
                yield
            self._merged = self._statistics = None
        else:
            yield
        update_bn(inputs, model)

    def subject(self, model: nn.Module) -> nn.Module:
        """Give a copy with merged weights.

        Args:
            model: The network at a task's optimum.

        Returns:
            The copy, in eval mode or, coupled, in train mode.
        """
        return continual.merge_batchnorm(model).coupled() if self._coupled and _norms(model) else super().subject(model)


def estimation_batch(model: nn.Module) -> int:
    """Examples of a batch that curvature is estimated on: with batch norm what training has, otherwise what is fast.

    Args:
        model: The network.

    Returns:
        The number.
    """
    return 100 if _norms(model) else 500


def _restandardised(model: nn.Module, inputs: Sequence[Tensor]) -> MergedBatchNorm:
    merged = continual.merge_batchnorm(model)
    merged.restandardise(inputs)
    return merged


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _freeze(model: nn.Module) -> None:
    for norm in _norms(model):
        norm.eval()
