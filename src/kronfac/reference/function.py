"""A model as a pure function of a vector of its parameters, and its Jacobian row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

#: Beyond this the dense matrices take gigabytes.
LARGEST = 20_000


class ModelFunction:
    """``theta -> model(inputs)``, for some of the model's parameters in one vector.

    The parameters are in the order of ``model.parameters()``, those with ``requires_grad`` only; shared ones
    count once. Nothing of the model is changed: buffers are copies, and batch norm in train mode, which normalises with
    the batch, forgets to update its running statistics.

    Attributes:
        names: Names of the parameters.
        theta: Their values, ``[P]``.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        names: Sequence[str] | None = None,
        outputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Collect the parameters.

        Args:
            model: The model.
            inputs: A tensor, a tuple or list of positional or a mapping of keyword arguments.
            names: Parameters to restrict to; None for all.
            outputs: Takes the tensor out of what the model returns; None if it is the tensor.

        Raises:
            ValueError: If there is no such parameter, or the model would draw random numbers or change its weights.
        """
        known = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            raise ValueError(f"the model has no parameters {unknown} that require gradients; it has {sorted(known)}")
        refuse_random(model)
        _refuse_renormalised(model)
        self.model, self.inputs, self.outputs = model, inputs, outputs
        self.parts = {name: p for name, p in known.items() if names is None or name in names}
        self.names = tuple(self.parts)
        if not self.names:
            raise ValueError("the model has no parameter that requires gradients")
        dtypes = {p.dtype for p in self.parts.values()}
        if len(dtypes) > 1:
            raise ValueError(f"the oracle needs parameters of one dtype, got {sorted(map(str, dtypes))}")
        self.theta = torch.cat([p.reshape(-1) for p in self.parts.values()])

    def __call__(self, theta: Tensor) -> Tensor:
        """Run the model.

        Args:
            theta: Parameters, ``[P]``.

        Returns:
            The outputs.

        Raises:
            TypeError: If the model returns no tensor.
        """
        pieces = theta.split([p.numel() for p in self.parts.values()])
        tensors = {n: t.reshape(p.shape) for (n, p), t in zip(self.parts.items(), pieces, strict=True)}
        tensors |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        several = isinstance(self.inputs, tuple | list)
        arguments, keywords = (tuple(self.inputs) if several else (self.inputs,)), {}
        if isinstance(self.inputs, Mapping):
            arguments, keywords = (), dict(self.inputs)
        with _untracked(self.model), _saved_plainly():
            found = functional_call(self.model, tensors, arguments, keywords)
        found = found if self.outputs is None else self.outputs(found)
        if not isinstance(found, Tensor):
            raise TypeError(f"the model returns {type(found).__name__}: say which tensor by outputs=")
        return found

    def check_dense(self) -> None:
        """Refuse to make a matrix that is too large.

        Raises:
            ValueError: If there are too many parameters.
        """
        size = len(self.theta)
        if size > LARGEST:
            gigabytes = size**2 * self.theta.element_size() / 1e9
            raise ValueError(
                f"{size} parameters make a dense matrix of {gigabytes:.1f} GB; the oracle stops at {LARGEST}. Use "
                "kronfac.GaussNewtonOperator (matrix-free), or per_example_roots(..., names=...) for single layers"
            )

    def jacobian(self) -> tuple[Tensor, Tensor]:
        """Differentiate each output, one backward pass each.

        Returns:
            Outputs ``[B, ...]`` and Jacobian ``[B, O, P]`` with an example's outputs in one dimension.
        """
        outputs, pull = pullback(self, self.theta)
        rows = []
        for index in range(outputs.numel()):
            unit = torch.zeros_like(outputs).reshape(-1)
            unit[index] = 1
            rows.append(pull(unit.reshape(outputs.shape)))
        return outputs.detach(), torch.stack(rows).reshape(len(outputs), -1, len(self.theta))

    def pull_examples(self, cotangents: Tensor) -> Tensor:
        """Pull each example's cotangent back on its own.

        Args:
            cotangents: ``[B, ...]``, of the outputs' shape.

        Returns:
            One gradient for each example, ``[B, P]``.
        """
        _, pull = pullback(self, self.theta)
        rows = []
        for index in range(len(cotangents)):
            alone = torch.zeros_like(cotangents)
            alone[index] = cotangents[index]
            rows.append(pull(alone))
        return torch.stack(rows)


def refuse_random(model: nn.Module) -> None:
    """Refuse a model that draws random numbers.

    Args:
        model: The model.

    Raises:
        ValueError: If it has dropout in train mode, or a random activation.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"dropout {name!r} is in train mode, so that there is no one model: use model.eval()")
        if isinstance(module, nn.RReLU) and module.lower != module.upper:
            raise ValueError(f"RReLU {name!r} is in train mode, so that there is no one model: use model.eval()")


def _refuse_renormalised(model: nn.Module) -> None:
    """Refuse embeddings that change their weights in place as they are called."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ValueError(
                f"{type(module).__name__} {name!r} has max_norm={module.max_norm}, by which it changes its weights in "
                "place when it is called: torch.func cannot differentiate that. Set it to None"
            )


def pullback(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`torch.func.vjp` of a function of one tensor.

    Args:
        function: The function.
        point: Where to differentiate.

    Returns:
        The value, and the function from cotangents to gradients.
    """
    value, pull = cast(tuple[Tensor, Callable[[Tensor], tuple[Tensor]]], vjp(function, point))
    return value, lambda cotangent: pull(cotangent)[0]


def symmetrised(matrix: Tensor) -> Tensor:
    """Remove rounding's asymmetry.

    Args:
        matrix: ``[P, P]``.

    Returns:
        The symmetric part.
    """
    return (matrix + matrix.T) / 2


@contextmanager
def _untracked(model: nn.Module) -> Iterator[None]:
    """Keep batch norm in train mode from touching its running statistics."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats
    ]
    # The fused kernels of attention in eval mode have no derivatives under torch.func.
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in norms:
            module.track_running_stats = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in norms:
            module.track_running_stats = True


@contextmanager
def _saved_plainly() -> Iterator[None]:
    """Leave out hooks on saved tensors (activation checkpoints), which `torch.func` refuses: they only save memory."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    with mock.patch.object(hooks, "__enter__", _nothing), mock.patch.object(hooks, "__exit__", _nothing):
        yield


def _nothing(*arguments: object) -> None:
    """Stand for a method."""
