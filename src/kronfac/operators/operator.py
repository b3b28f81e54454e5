"""The face of a matrix-free curvature operator, by products over batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronfac._typing import NamedTensors
from kronfac.eager import require_whole
from kronfac.forwards import batches_of
from kronfac.likelihoods import Likelihood
from kronfac.operators.passes import Pick, random_state
from kronfac.vectors import require_real

#: Beyond this a dense matrix takes gigabytes, and as many passes over the data as there are parameters.
LARGEST = 20_000


class ParameterOperator(ABC):
    """A symmetric matrix over a model's parameters, known by its products.

    The matrix is that of the loss as the likelihood's ``reduction`` defines it over all data: sums over batches divided
    by the sum of the batches' denominators. It follows the model: its parameters and mode at the time of a product
    count. Buffers and the random state are left alone. Dropout in train mode draws its masks from the random state of
    the moment of construction in each pass, so that the operator is one matrix; batch norm in train mode couples the
    examples of a batch and is differentiated through it.

    Attributes:
        model: The model.
        likelihood: The loss.
        parameter_names: The parameters that the matrix is over, in the order of ``model.parameters()``.
        parameter_shapes: Their shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        loader: Iterable[Any] | tuple[Any, Any],
        *,
        outputs: Pick = None,
        parameters: Sequence[str] | None = None,
    ) -> None:
        """Store model and data; no pass is made.

        Args:
            model: The model.
            likelihood: The loss.
            loader: Pairs ``(inputs, targets)`` that can be iterated over more than once (a list or a ``DataLoader``),
                or a single pair. Inputs are a tensor, a tuple of positional or a mapping of keyword arguments.
            outputs: Takes the output tensor out of what the model returns.
            parameters: Names of the parameters that the matrix is over, a principal submatrix of the whole: products
                then pass only through what lies between these parameters and the outputs. By default all that
                require gradients.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If the model has no parameter that requires gradients, or not one of those named, or processes
                hold parts of them.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood must be a kronfac.Likelihood, got {type(likelihood).__name__}")
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise TypeError(
                "loader must be iterable again and again (a list of pairs or a DataLoader), got "
                f"{type(loader).__name__}"
            )
        require_whole(model)
        self.model, self.likelihood, self._loader, self._pick = model, likelihood, loader, outputs
        known = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not known:
            raise ValueError("the model has no parameter that requires gradients")
        if parameters is not None:
            unknown = [name for name in parameters if name not in known]
            if unknown or not parameters:
                raise ValueError(
                    f"parameters={list(parameters)} must name parameters of the model that require gradients; "
                    f"unknown or frozen: {unknown}"
                )
            known = {name: p for name, p in known.items() if name in set(parameters)}
        require_real(name for name, p in known.items() if p.is_complex())
        self.parameter_names = tuple(known)
        self.parameter_shapes = {name: p.shape for name, p in known.items()}
        self._random_state = random_state(model)

    @abstractmethod
    def _product(self, inputs: Any, targets: Any, vector: NamedTensors) -> tuple[list[Tensor], Tensor]:
        """Product of one batch's *sum* with a vector, in the order of the parameters, and the batch's denominator."""

    @abstractmethod
    def _form(self, inputs: Any, targets: Any, vector: NamedTensors) -> tuple[Tensor, Tensor]:
        """Quadratic form of one batch's *sum*, and the batch's denominator."""

    def matmul(self, vector: NamedTensors) -> dict[str, Tensor]:
        """Multiply by a vector; differentiable in the vector, at the price of another product for each derivative.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            ``C v`` by parameter name.
        """
        vector = self._ordered(vector)
        if _wants_gradients(vector):
            return dict(zip(vector, _Symmetric.apply(self._multiply, tuple(vector), *vector.values()), strict=True))
        return self._multiply(vector)

    def _multiply(self, vector: NamedTensors) -> dict[str, Tensor]:
        # In 16 bits a long sum stands still: each batch is less than half the last digit of those before.
        total = [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in vector.values()]
        parts = []
        for inputs, targets in self._batches():
            product, part = self._product(inputs, targets, vector)
            torch._foreach_add_(total, [g.to(t.dtype) for g, t in zip(product, total, strict=True)])
            parts.append(part)
        scale = self._denominator(parts)
        return {name: (t / scale.to(t)).to(v.dtype) for (name, v), t in zip(vector.items(), total, strict=True)}

    def quadratic_form(self, vector: NamedTensors) -> Tensor:
        """``v^T C v``; differentiable in the vector.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            0-dimensional.
        """
        vector = self._ordered(vector)
        if _wants_gradients(vector):
            product = self.matmul(vector)
            return torch.stack([(v * product[name]).sum() for name, v in vector.items()]).sum()
        forms, parts = zip(*(self._form(x, y, vector) for x, y in self._batches()), strict=True)
        return torch.stack(forms).sum() / self._denominator(list(parts))

    def trace(self, samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Estimate the trace by random signs, ``mean of xi^T C xi`` (Hutchinson 1989).

        Unbiased; its variance is twice the sum of squares off the diagonal, over ``samples``.

        Args:
            samples: Number of vectors of signs, one pass over the data each.
            generator: Source of randomness on the parameters' device; None for torch's own.

        Returns:
            0-dimensional.
        """
        return torch.stack([self.quadratic_form(v) for v in self._signs(samples, generator)]).mean()

    def diagonal(self, samples: int = 100, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Estimate the diagonal by random signs, ``mean of xi * C xi`` (Bekas, Kokiopoulou & Saad 2007).

        Unbiased, though single entries may come out negative.

        Args:
            samples: Number of vectors of signs, one pass over the data each.
            generator: Source of randomness on the parameters' device; None for torch's own.

        Returns:
            ``{parameter name: tensor}``.
        """
        total: dict[str, Tensor] = {}
        for vector in self._signs(samples, generator):
            for name, product in self.matmul(vector).items():
                part = (vector[name] * product).to(torch.promote_types(product.dtype, torch.float32))
                total[name] = total[name] + part if name in total else part
        return {name: (t / samples).to(vector[name].dtype) for name, t in total.items()}

    def to_dense(self) -> Tensor:
        """The whole matrix, by as many products as there are parameters.

        Returns:
            ``[P, P]``, in the order of `torch.nn.utils.parameters_to_vector`.

        Raises:
            ValueError: If there are too many parameters.
        """
        sizes = [shape.numel() for shape in self.parameter_shapes.values()]
        if sum(sizes) > LARGEST:
            raise ValueError(
                f"{sum(sizes)} parameters make a dense matrix of {sum(sizes) ** 2 * 4 / 1e9:.1f} GB in float32; "
                f"to_dense() stops at {LARGEST}. Use matmul, trace and diagonal"
            )
        first = next(iter(self._parameters().values()))
        rows = []
        for unit in torch.eye(sum(sizes), dtype=first.dtype, device=first.device):
            vector = {
                name: part.reshape(shape)
                for (name, shape), part in zip(self.parameter_shapes.items(), unit.split(sizes), strict=True)
            }
            rows.append(torch.cat([t.reshape(-1) for t in self.matmul(vector).values()]))
        return torch.stack(rows, 1)

    def _parameters(self) -> dict[str, Tensor]:
        known = dict(self.model.named_parameters())
        return {name: known[name] for name in self.parameter_names}

    def _ordered(self, vector: NamedTensors) -> dict[str, Tensor]:
        """Check a vector, and bring it into the order of the parameters."""
        check_vector(self.parameter_shapes, vector, complete=True)
        for name, tensor in vector.items():
            if not tensor.is_floating_point():  # the product has its dtype
                raise TypeError(f"the vector's entry {name!r} is {tensor.dtype}: it must be of real floating point")
        return {name: vector[name] for name in self.parameter_names}

    def _signs(self, samples: int, generator: torch.Generator | None) -> Iterator[dict[str, Tensor]]:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be a positive integer, got {samples!r}")
        for _ in range(samples):
            yield {
                name: torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p.dtype).mul_(2).sub_(1)
                for name, p in self._parameters().items()
            }

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        empty = True
        for batch in batches_of(self._loader):
            empty = False
            yield batch
        if empty:
            raise ValueError("loader is empty: there is no batch to take the curvature of")

    def _denominator(self, parts: list[Tensor]) -> Tensor:
        """Denominator of all batches together."""
        return torch.ones_like(parts[0]) if self.likelihood.reduction == "sum" else torch.stack(parts).sum()


class _Symmetric(torch.autograd.Function):
    """A product with a symmetric matrix, whose derivative is another product with it."""

    @staticmethod
    def forward(
        ctx: Any, multiply: Callable[[NamedTensors], dict[str, Tensor]], names: tuple[str, ...], *vector: Tensor
    ) -> tuple[Tensor, ...]:
        """Multiply.

        Args:
            ctx: What the derivative needs.
            multiply: The product.
            names: Names of the vector's entries.
            vector: The vector.

        Returns:
            The product's entries.
        """
        ctx.multiply, ctx.names = multiply, names
        return tuple(multiply({name: v.detach() for name, v in zip(names, vector, strict=True)}).values())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Multiply the gradients.

        Args:
            ctx: What `forward` left.
            gradients: The gradients in the product's entries.

        Returns:
            Those in the arguments of `forward`.
        """
        return None, None, *_Symmetric.apply(ctx.multiply, ctx.names, *gradients)


def _wants_gradients(vector: NamedTensors) -> bool:
    return torch.is_grad_enabled() and any(v.requires_grad for v in vector.values())


def check_vector(shapes: Mapping[str, torch.Size], vector: NamedTensors, complete: bool) -> None:
    """Refuse a vector that does not fit the parameters.

    Args:
        shapes: Shapes by parameter name.
        vector: The vector.
        complete: Whether every parameter must be there.

    Raises:
        TypeError: If it is no mapping of names to tensors.
        ValueError: If entries are missing, unknown or misshaped.
    """
    if not isinstance(vector, Mapping):
        raise TypeError(f"a vector is a mapping {{parameter name: tensor}}, got {type(vector).__name__}")
    unknown = [name for name in vector if name not in shapes]
    missing = [name for name in shapes if name not in vector] if complete else []
    if unknown or missing:
        raise ValueError(f"the vector does not fit the parameters: missing {missing[:5]}, unknown {unknown[:5]}")
    for name, tensor in vector.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"the vector's entry {name!r} must be a tensor, got {type(tensor).__name__}")
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"the vector's entry {name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(shapes[name])}"
            )
