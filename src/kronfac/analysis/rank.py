"""How many directions a mini-batch's curvature sees: the rank of Monte-Carlo matrices (Botev et al. 2017, appendix D).

A batch of ``N`` examples gives a Gauss-Newton matrix ``(1/D) Σ_n J_nᵀ H_n J_n`` of rank at most ``Σ_n rank H_n``, which
is ``N`` where the output is one number. Gradients at ``S`` sampled labels for each example give at most ``N S``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from kronfac.analysis.scene import require_one_network
from kronfac.likelihoods import Likelihood
from kronfac.likelihoods.checks import Targets
from kronfac.measuring import couples_examples

#: Largest matrix of gradients that is held at once: 4 GiB in float64.
LIMIT = 1 << 29


def monte_carlo_rank(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Tensor,
    targets: Targets = None,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    samples: int = 1,
    parameters: Sequence[str] | None = None,
    seed: int = 0,
) -> list[dict[str, int]]:
    """Compare ranks of the curvature of mini-batches with that of all data.

    Every example is differentiated by itself, with `torch.func`, in the model's dtype; ranks are those of roots: the
    number of singular values beyond ``max(rows, columns) · ε · largest``, which resolves what squares would lose. Use
    float64.

    Args:
        model: The model, in a mode in which its outputs are no random numbers.
        likelihood: The loss.
        inputs: All examples ``[N, ...]``; batches are drawn from them without replacement, each within the next.
        targets: Targets, where the likelihood needs them, or a pair with a mask.
        batch_sizes: Sizes of the batches, at most ``N``.
        samples: Labels ``S`` that are drawn for each example.
        parameters: Names of the parameters to look at, such as those of one layer; all trained ones by default.
        seed: Of batches and labels.

    Returns:
        A row for each batch size: ``batch_size``, ``samples``, ``parameters`` (the number ``P``), ``all_ggn`` (rank
        of the Gauss-Newton matrix of all examples), ``batch_ggn`` (of the batch's), ``batch_ggn_bound``
        (``min(P, Σ_n rank H_n)``), ``batch_sampled`` (of the Fisher at sampled labels) and ``batch_sampled_bound``
        (``min(P, N S, Σ_n rank H_n)``).

    Raises:
        ValueError: A batch size or ``samples`` is out of range, batch norm couples the examples, or there are too many
            parameters.
    """
    sizes = _check_sizes(batch_sizes, len(inputs))
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples={samples!r} must be a positive integer.")
    if couples_examples(model):
        raise ValueError("Batch norm in train mode couples the examples: call model.eval() first.")
    require_one_network(model, inputs, None)
    chosen = _choose(model, parameters)
    width = sum(parameter.numel() for parameter in chosen.values())
    generator = torch.Generator(inputs.device).manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator, device=inputs.device)
    with torch.no_grad():
        outputs = model(inputs).detach()
        likelihood.validate(outputs, targets)
        columns = torch.stack([column.to(outputs) for column in likelihood.root_columns(outputs, targets)])
        draws = [likelihood.sample_cotangents(outputs, targets, generator).to(outputs) for _ in range(samples)]
    if columns.shape[0] * len(inputs) * width > LIMIT:
        raise ValueError(
            f"The roots of {len(inputs)} examples, {columns.shape[0]} columns over {width} parameters, are more than "
            f"{LIMIT} numbers; pass fewer inputs, or parameters= of one layer."
        )
    inputs, columns, draws = inputs[order], columns[:, order], [draw[order] for draw in draws]
    ranks = _ranks(columns.reshape(*columns.shape[:2], -1).transpose(0, 1))
    roots = torch.stack([_gradients(model, chosen, inputs, column) for column in columns], 1)
    drawn = torch.stack([_gradients(model, chosen, inputs, draw) for draw in draws], 1)
    whole = _rank(roots.flatten(0, 1))
    rows = []
    for size in sizes:
        possible = int(ranks[:size].sum())
        rows.append(
            {
                "batch_size": size,
                "samples": samples,
                "parameters": width,
                "all_ggn": whole,
                "batch_ggn": _rank(roots[:size].flatten(0, 1)),
                "batch_ggn_bound": min(width, possible),
                "batch_sampled": _rank(drawn[:size].flatten(0, 1)),
                "batch_sampled_bound": min(width, size * samples, possible),
            }
        )
    return rows


def _check_sizes(batch_sizes: Sequence[int], most: int) -> list[int]:
    sizes = list(batch_sizes)
    if not sizes:
        raise ValueError("batch_sizes is empty.")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
            raise ValueError(f"batch_sizes: {size!r} is no integer from 1 to the {most} examples given.")
    return sizes


def _choose(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    known = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if names is None:
        return known
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        raise ValueError(f"parameters: no trained parameters {unknown}; choose of {sorted(known)}.")
    return {name: known[name] for name in known if name in names}


def _gradients(model: nn.Module, chosen: dict[str, Tensor], inputs: Tensor, cotangents: Tensor) -> Tensor:
    """Gradient of ``⟨z_n, v_n⟩`` for each example alone, ``[B, P]``."""

    def one(x: Tensor, cotangent: Tensor) -> Tensor:
        def function(tensors: dict[str, Tensor]) -> Tensor:
            return functional_call(model, tensors, (x.unsqueeze(0),)).squeeze(0)

        _, pull = cast(tuple[Tensor, Callable[[Tensor], tuple[dict[str, Tensor]]]], vjp(function, chosen))
        (pulled,) = pull(cotangent)
        return torch.cat([pulled[name].reshape(-1) for name in chosen])

    return vmap(one)(inputs, cotangents).detach()


def _rank(root: Tensor) -> int:
    """Rank of one matrix, which may be long."""
    rows, columns = root.shape
    if max(rows, columns) > 2 * min(rows, columns):  # the triangular factor has the same singular values
        root = torch.linalg.qr(root if rows > columns else root.T, mode="r").R
    return int(_ranks(root, max(rows, columns)))


def _ranks(roots: Tensor, size: int = 0) -> Tensor:
    """Numbers of singular values that rounding cannot explain, for ``[..., rows, columns]``."""
    values = torch.linalg.svdvals(roots)
    tolerance = max(size, *roots.shape[-2:]) * torch.finfo(roots.dtype).eps
    return (values > tolerance * values[..., :1]).sum(-1)
