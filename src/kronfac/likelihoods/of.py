"""The likelihood that a loss module stands for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kronfac.likelihoods.base import Likelihood
from kronfac.likelihoods.bernoulli import Bernoulli
from kronfac.likelihoods.categorical import Categorical
from kronfac.likelihoods.gaussian import Gaussian

# What nn.CrossEntropyLoss has when nobody asked for an ignored index.
_UNASKED_IGNORE_INDEX = -100


def likelihood_of(module: nn.Module) -> Likelihood:
    """Read the likelihood off a loss module, its weights and reduction included.

    ``nn.CrossEntropyLoss`` gives `Categorical` (classes in dimension 1, as torch has them), ``nn.BCEWithLogitsLoss``
    gives `Bernoulli`, ``nn.MSELoss`` gives `Gaussian` of variance 1/2; `loss` then equals the module's value. An
    ``ignore_index`` of -100, torch's default, is read as "none": a target -100 is then an error that advises to state
    ``Categorical(ignore_index=-100)``, because a default that silently leaves targets out hides mistakes. Any other
    value is kept.

    Args:
        module: The loss module.

    Returns:
        The likelihood.

    Raises:
        TypeError: If the module is none of these, or has a ``forward`` of its own.
    """
    for kind, read in _READERS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module):
            return read(module)
    name = type(module).__name__ if isinstance(module, nn.Module) else repr(module)
    raise TypeError(
        f"{name} is not a loss whose likelihood is known; known are {', '.join(kind.__name__ for kind in _READERS)}. "
        "Subclass kronfac.Likelihood for your own"
    )


def _cross_entropy(module: nn.CrossEntropyLoss) -> Likelihood:
    ignored = None if module.ignore_index == _UNASKED_IGNORE_INDEX else module.ignore_index
    return Categorical(
        weight=module.weight,
        ignore_index=ignored,
        label_smoothing=module.label_smoothing,
        reduction=module.reduction,
        class_dim=1,
    )


def _binary_cross_entropy(module: nn.BCEWithLogitsLoss) -> Likelihood:
    return Bernoulli(weight=module.weight, pos_weight=module.pos_weight, reduction=module.reduction)


def _squared_error(module: nn.MSELoss) -> Likelihood:
    return Gaussian(variance=0.5, reduction=module.reduction)


_READERS: dict[type[nn.Module], Callable[..., Likelihood]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.BCEWithLogitsLoss: _binary_cross_entropy,
    nn.MSELoss: _squared_error,
}
