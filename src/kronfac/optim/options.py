"""Validation of optimiser arguments, at construction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from kronfac import processes


class KFACOptions(TypedDict, total=False):
    """Rarely needed options of :class:`kronfac.optim.KFAC`.

    Attributes:
        decoupled_weight_decay: Shrink parameters by ``lr · weight_decay`` instead of adding ``weight_decay · θ`` to the
            gradient and to the damping.
        asynchronous: After how many steps the inverses that are due every ``invert_every`` steps take effect; meanwhile
            a thread computes them from copies of the factors. 0 computes them within the step. The step at which they
            take effect is fixed, so that runs repeat and resume bit for bit.
        drift: Renew inverses before they are due, whenever new statistics have moved further than this from those that
            were inverted: :func:`kronfac.optim.drift.largest_drift`, say 0.3. None never does.
        inverse: How damped Kronecker factors are inverted. ``"cholesky"``, or ``"newton_schulz"``: by products alone,
            starting from the inverses of the refresh before (:mod:`kronfac.linalg.newton_schulz`); factors that are too
            far from those of before, or too ill-conditioned, take Cholesky, which ``optimizer.health()`` counts.
        products: Precision of the products with the inverses. ``"float32"`` (the inverses' own), or ``"bfloat16"`` for
            layers of at least 128 inputs and outputs: what is large in a gradient is multiplied in float32, the rest in
            bfloat16 (:mod:`kronfac.linalg.rounded`). The first direction after each refresh is computed both ways, and
            a layer where their cosine is below 0.99 stays in float32 until the next; ``optimizer.health()`` has it.
        gradients: ``"dense"``, or ``"rows"``: linear layers wider than the batch keep the inputs and cotangents that
            their gradient is made of, and only their direction is formed (:mod:`kronfac.optim.rows`). **Their weights'
            ``.grad`` stays None**, so that nothing else may look at gradients or change them: what scales the biases'
            is refused. It needs ``kl_clip=None``, no coupled weight decay, one process, and ``optimizer.zero_grad()``.
        burn_in: Statistics are gathered on each of the first so many steps.
        stats_examples: How many examples of a forward statistics are of at most: the first of them, which of shuffled
            batches are as good as any. None for all. ``warm_up`` takes whole batches. Fewer than half of the batch take
            a second forward of these examples alone, with dropout masks of its own, which neither the random state nor
            the buffers show; more than that, and with batch norm in train mode any number, are cut from the training
            forward. There the pull is that of the whole batch, and so are the drawn labels.
        stats_forward: ``"shared"`` takes statistics from the training forward. ``"own"`` runs one more before it for
            them, with the same random numbers and buffers untouched, whose memory is given back layer by layer while it
            is pulled: the wide maps of the first layers of a convolutional network never lie beside the training
            graph, at the price of a forward wherever statistics are due. Compiled models have it in any case; outputs
            that are captured by hand, and parts of a batch, do not.
        sharing: ``"expand"`` or ``"reduce"`` for weights shared over positions.
        norm: ``"unitwise"`` or ``"full"`` blocks of normalisation layers.
        outputs: Picks the output tensor from what the model returns.
        param_groups: Groups as PyTorch's optimisers take them; all trainable parameters by default.
    """

    decoupled_weight_decay: bool
    asynchronous: int
    drift: float | None
    inverse: str
    products: str
    gradients: str
    burn_in: int
    stats_examples: int | None
    stats_forward: str
    sharing: str
    norm: str
    outputs: Callable[[Any], Tensor] | None
    param_groups: Iterable[dict[str, Any]] | None


CHOICES = {
    "inverse": ("cholesky", "newton_schulz"),
    "products": ("float32", "bfloat16"),
    "gradients": ("dense", "rows"),
    "stats_forward": ("shared", "own"),
}

DEFAULTS = KFACOptions(
    decoupled_weight_decay=False,
    asynchronous=0,
    drift=None,
    inverse="cholesky",
    products="float32",
    gradients="dense",
    burn_in=10,
    stats_examples=None,
    stats_forward="shared",
    sharing="expand",
    norm="unitwise",
    outputs=None,
    param_groups=None,
)


def complete(options: KFACOptions) -> KFACOptions:
    """Fill in defaults and refuse unknown names.

    Args:
        options: The user's.

    Returns:
        All options.

    Raises:
        TypeError: A name is unknown.
        ValueError: A value is.
    """
    unknown = set(options) - set(DEFAULTS)
    if unknown:
        raise TypeError(f"KFAC got unknown options {sorted(unknown)}; known are {sorted(DEFAULTS)}.")
    merged = KFACOptions(**{**DEFAULTS, **options})
    for name in ("burn_in", "asynchronous"):
        at_least(name, merged[name], 0, integer=True)
    if merged["stats_examples"] is not None:
        at_least("stats_examples", merged["stats_examples"], 1, integer=True)
    for name, known in CHOICES.items():
        if (value := merged[name]) not in known:  # type: ignore[literal-required]
            raise ValueError(f"{name}={value!r} is unknown; choose one of {known}.")
    if merged["drift"] is not None:
        at_least("drift", merged["drift"], 0.0, open_=True)
    return merged


def at_least(name: str, value: Any, low: float, *, integer: bool = False, open_: bool = False) -> None:
    """Refuse a number below a bound.

    Args:
        name: The argument's name.
        value: Its value.
        low: The bound.
        integer: Whether it must be an integer.
        open_: Whether the bound itself is refused.

    Raises:
        ValueError: It does not fit.
    """
    wanted = f"{'an integer' if integer else 'a number'} {'>' if open_ else '>='} {low:g}"
    good = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or (open_ and value == low):
        raise ValueError(f"{name}={value!r} must be {wanted}.")


def check_group(group: dict[str, Any], names: Mapping[int, str] | None = None) -> None:
    """Validate a parameter group.

    Args:
        group: The group.
        names: Names of the model's parameters by their id; the group may hold no others.

    Raises:
        ValueError: A hyper-parameter is out of range, or a tensor is no parameter of the model.
    """
    if names is not None and (strangers := [p for p in group["params"] if id(p) not in names]):
        raise ValueError(f"param_groups hold {len(strangers)} tensors that are no parameters of the model.")
    lr = group["lr"]
    if isinstance(lr, Tensor):
        raise ValueError("lr as a tensor is not supported; pass a float.")
    at_least("lr", lr, 0.0)
    at_least("momentum", group["momentum"], 0.0)
    if group["momentum"] >= 1:
        raise ValueError(f"momentum={group['momentum']!r} must be less than 1.")
    at_least("damping", group["damping"], 0.0)
    at_least("weight_decay", group["weight_decay"], 0.0)
    bound = group["kl_clip"]
    if isinstance(bound, str) and bound != "auto":
        raise ValueError(f"kl_clip={bound!r} must be a number > 0, 'auto' or None.")
    if bound is not None and not isinstance(bound, str):
        at_least("kl_clip", bound, 0.0, open_=True)


def make_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return the user's generator, or one of our own with a fixed seed.

    Args:
        generator: The user's.
        device: Device of the model.

    Returns:
        The generator.

    Raises:
        TypeError: It is no generator.
        ValueError: The generator is on another device.
    """
    if generator is None:
        # A seed of its own for each process: equal draws would only repeat their error.
        distributed = torch.distributed
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        return torch.Generator(device).manual_seed(rank)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}.")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, the model on {device}; make one there.")
    return generator


def several_processes() -> bool:
    """Whether this is one of several processes of a distributed run.

    Returns:
        True if so.
    """
    return processes.several()


def values_of(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, without the zeros that a sparse one leaves out.

    Args:
        gradient: Dense, or sparse as that of ``nn.Embedding(sparse=True)``.

    Returns:
        A dense tensor, of another shape if it was sparse.
    """
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def inner_product(gradient: Tensor, direction: Tensor) -> Tensor:
    """Inner product of a gradient and its direction; sparse ones are directions of their own, or made dense.

    That of complex numbers is the one of their real and imaginary parts.

    Args:
        gradient: Dense or sparse.
        direction: Of the same shape.

    Returns:
        0-dimensional.
    """
    if gradient.is_sparse and direction is gradient:
        return values_of(gradient).abs().square().sum()
    pair = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in (gradient, direction)]
    flat = [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).flatten() for t in pair]
    return torch.dot(*flat)


def with_decay(gradient: Tensor, parameter: Tensor, decay: float) -> Tensor:
    """Add the gradient of a coupled weight decay.

    Args:
        gradient: Dense or sparse.
        parameter: Of the same shape.
        decay: The weight decay.

    Returns:
        A new, dense tensor.
    """
    return parameter.mul(decay).add_(gradient) if gradient.is_sparse else gradient.add(parameter, alpha=decay)


def check_finite(gradients: dict[str, Tensor], directions: dict[str, Tensor] | None = None) -> None:
    """Refuse gradients that are not finite, and directions, which any such gradient spoils.

    Args:
        gradients: By parameter name.
        directions: What the step is made of, where there are any yet.

    Raises:
        FloatingPointError: One is NaN or Inf; the text names the parameters.
    """
    looked_at = [values_of(tensor) for tensor in (gradients if directions is None else directions).values()]
    if not looked_at:
        return
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(looked_at)])
    if math.isfinite(float(norms.sum())):
        return
    for what, tensors in (("gradient", gradients), ("preconditioned gradient", directions or {})):
        if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(values_of(tensor)).all())]:
            raise FloatingPointError(
                f"NaN or Inf in the {what} of {', '.join(bad)}; no parameter was changed. The loss may have diverged: "
                "lower lr, raise damping, or set kl_clip."
            )
