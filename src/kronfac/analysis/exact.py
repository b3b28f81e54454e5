"""The exact Gauss-Newton matrix of layers by its roots, ``C = Σ_k u_k u_kᵀ``, not formed where it is large."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfac.analysis.scene import Scene, measure
from kronfac.forwards import call_model, pick_outputs
from kronfac.inspect.text import size
from kronfac.measuring import frozen_buffers
from kronfac.sources import Exact, Sample
from kronfac.tape import record


@dataclass(frozen=True)
class ExactLayers:
    """The exact curvature and the gradient of some layers, in float64.

    Attributes:
        roots: ``u`` by layer, ``[K, *stack, d_out, d_in]``; row ``k`` is of the same output of the same example in
            all layers, so that products between layers are the blocks between them.
        gradients: The gradient of the loss by layer, ``[*stack, d_out, d_in]``.
        pairs: Where asked for, rows ``a`` ``[K, d_in]`` and cotangents ``u`` ``[K, d_out]`` of layers with one
            position, scaled so that ``C = (1/K) Σ (u uᵀ) ⊗ (a aᵀ)``.
    """

    roots: dict[str, Tensor]
    gradients: dict[str, Tensor]
    pairs: dict[str, tuple[Tensor, Tensor]]


def gather(scene: Scene, memory_limit: int, *, keep_pairs: bool = False) -> ExactLayers:
    """Pull every column of the loss's root back, and keep the gradients of all examples.

    Args:
        scene: What is analysed.
        memory_limit: Bytes that the roots may take.
        keep_pairs: Keep also the rows and cotangents that the roots are products of.

    Returns:
        Roots and gradients.
    """
    require_room(scene, memory_limit)
    found: dict[str, list[Tensor]] = {name: [] for name in scene.adapters}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in scene.adapters}
    slopes: dict[str, Tensor] = {}
    total = 0.0

    def take(sample: Sample) -> None:
        layer, g = sample.layer, sample.cotangents
        assert g is not None
        root = math.sqrt(sample.weight)
        found[layer.name].append(layer.per_example_gradients(sample.inputs, g).double() * root)
        if keep_pairs and not layer.stack and not layer.diagonal_input and not layer.unit_wise:
            a, u = layer.expand(sample.inputs), layer.expand_cotangents(g)
            if a.shape[1] == 1:
                pairs[layer.name].append((a[:, 0].double(), u[:, 0].double() * root))

    parameters = {name: p for adapter in scene.adapters.values() for name, p in adapter.parameters.items()}
    with frozen_buffers(scene.model):
        for inputs, targets in scene.batches:
            with torch.enable_grad(), record(scene.adapters) as tape:
                out = pick_outputs(call_model(scene.model, inputs), scene.outputs)
            Exact().stream(tape, scene.likelihood, out, targets, None, take)
            with torch.enable_grad():
                loss = scene.likelihood.sum_loss(out, targets)
                parts = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            slopes = {name: slopes.get(name, 0) + part for name, part in zip(parameters, parts, strict=True)}
            total += float(scene.likelihood.denominator(out.detach(), targets))
    # Sums over batches over the sum of denominators; a loss that is a sum is the sum over all batches.
    scale = 1.0 if scene.likelihood.reduction == "sum" else 1.0 / total
    roots = {name: torch.cat(parts).mul_(math.sqrt(scale)) for name, parts in found.items()}
    gradients = {name: adapter.pack(slopes).double() * scale for name, adapter in scene.adapters.items()}
    joined = {}
    for name, both in pairs.items():
        if both:
            a, u = (torch.cat(side) for side in zip(*both, strict=True))
            joined[name] = (a, u * math.sqrt(scale * len(u)))
    return ExactLayers(roots, gradients, joined)


def require_room(scene: Scene, memory_limit: int) -> None:
    """Refuse an exact analysis that is too large.

    Args:
        scene: What is to be analysed.
        memory_limit: Bytes that the roots may take.

    Raises:
        ValueError: The text says how large it is, and what would fit.
    """
    examples, roots = measure(scene)
    sizes = {name: adapter.shape.numel() for name, adapter in scene.adapters.items()}
    parameters = sum(sizes.values())
    # Roots, a copy while they are put together, and the Gram matrix of the outputs.
    needed = 8 * (2 * roots * parameters + roots**2)
    if needed <= memory_limit:
        return
    outputs = roots / examples
    fitting = int((math.sqrt(parameters**2 + memory_limit / 8) - parameters) / outputs)
    fewer = f"at most {fitting} examples" if fitting else "fewer layers (one example alone is too much)"
    smallest = min(sizes, key=lambda name: sizes[name])
    raise ValueError(
        f"An exact analysis of {parameters} parameters with {examples} examples of {outputs:g} outputs needs "
        f"{size(needed)}; memory_limit is {size(memory_limit)}. Use {fewer}, or layers=[{smallest!r}, ...] to look at "
        "some layers, or raise memory_limit=. Of a model that is too large altogether, kronfac.estimate(..., "
        "source='sampled') gives the approximations themselves, without an exact matrix to compare with."
    )


def damped_solve(roots: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """Solve ``(Σ_k u_k u_kᵀ + λ I) x = g``, by Woodbury's identity where there are fewer roots than parameters.

    Args:
        roots: ``u``, ``[K, n]``.
        gradient: ``g``, ``[n]``.
        damping: ``λ``, positive.

    Returns:
        ``x``, ``[n]``.
    """
    if len(roots) >= roots.shape[1]:
        matrix = roots.mT @ roots
        matrix.diagonal().add_(damping)
        return torch.cholesky_solve(gradient.unsqueeze(1), torch.linalg.cholesky(matrix)).squeeze(1)
    gram = roots @ roots.mT
    gram.diagonal().add_(damping)
    factor = torch.linalg.cholesky(gram)

    def solve(vector: Tensor) -> Tensor:
        inner = torch.cholesky_solve((roots @ vector).unsqueeze(1), factor).squeeze(1)
        return (vector - roots.mT @ inner) / damping

    x = solve(gradient)
    # Where g lies in a direction of large curvature the difference above loses digits; one refinement gives them back.
    return x + solve(gradient - roots.mT @ (roots @ x) - damping * x)


def joint_roots(exact: ExactLayers, layers: Sequence[str]) -> Tensor:
    """Put the roots of layers beside each other: those of the matrix with the blocks between layers.

    Args:
        exact: The layers.
        layers: Which, in order.

    Returns:
        ``[K, Σ n]``.
    """
    return torch.cat([exact.roots[name].flatten(1) for name in layers], dim=1)


def flat(matrices: Mapping[str, Tensor], layers: Sequence[str]) -> Tensor:
    """Put the matrices of layers into one vector, in the order of `joint_roots`.

    Args:
        matrices: ``[*stack, d_out, d_in]`` by layer.
        layers: Which, in order.

    Returns:
        ``[Σ n]``.
    """
    return torch.cat([matrices[name].flatten() for name in layers])
