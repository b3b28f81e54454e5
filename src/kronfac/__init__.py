"""Kronecker-factored curvature for PyTorch that people can trust.

Everything public is reached from here, by convention as ``import kronfac as kf``: the likelihoods (``kf.Categorical``),
the optimisers (``kf.optim.KFAC``), curvature as an operator (``kf.estimate``, ``kf.save``, ``kf.load``), the checks
(``kf.coverage``, ``kf.verify``) and the dense oracle (``kf.reference``). Names are resolved on first use, so that
``import kronfac`` costs next to nothing and never loads an optional dependency.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kronfac import (
        analysis,
        approximations,
        blocks,
        continual,
        damping,
        experiments,
        inspect,
        layers,
        likelihoods,
        operators,
        optim,
        plots,
        reference,
        sources,
    )
    from kronfac.curvature import BlockDiagonal
    from kronfac.curvature_coupled import BlockTridiagonal
    from kronfac.estimation import estimate
    from kronfac.estimator import CoverageWarning, Estimator
    from kronfac.inspect.covered import coverage
    from kronfac.inspect.verification import verify
    from kronfac.inspect.verified import VerificationError
    from kronfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, likelihood_of
    from kronfac.operators import GaussNewtonOperator, HessianOperator
    from kronfac.storage import StorageError, load, save
    from kronfac.tape import TapeError

__version__ = "0.1.0"

# Where each public name lives. A new public name is one line here, one above for type checkers and one in __all__
# (a literal, because type checkers and linters do not read computed ones); a test holds the three together.
_HOMES = {
    "BlockDiagonal": "curvature",
    "BlockTridiagonal": "curvature_coupled",
    "CoverageWarning": "estimator",
    "Estimator": "estimator",
    "estimate": "estimation",
    "VerificationError": "inspect",
    "coverage": "inspect",
    "verify": "inspect",
    "Bernoulli": "likelihoods",
    "Categorical": "likelihoods",
    "Gaussian": "likelihoods",
    "Likelihood": "likelihoods",
    "likelihood_of": "likelihoods",
    "GaussNewtonOperator": "operators",
    "HessianOperator": "operators",
    "StorageError": "storage",
    "load": "storage",
    "save": "storage",
    "TapeError": "tape",
}
_SUBMODULES = frozenset(
    {
        "analysis",
        "approximations",
        "blocks",
        "continual",
        "damping",
        "experiments",
        "inspect",
        "layers",
        "likelihoods",
        "operators",
        "optim",
        "plots",
        "reference",
        "sources",
    }
)

__all__ = [
    "Bernoulli",
    "BlockDiagonal",
    "BlockTridiagonal",
    "Categorical",
    "CoverageWarning",
    "Estimator",
    "GaussNewtonOperator",
    "Gaussian",
    "HessianOperator",
    "Likelihood",
    "StorageError",
    "TapeError",
    "VerificationError",
    "analysis",
    "approximations",
    "blocks",
    "continual",
    "coverage",
    "damping",
    "estimate",
    "experiments",
    "inspect",
    "layers",
    "likelihood_of",
    "likelihoods",
    "load",
    "operators",
    "optim",
    "plots",
    "reference",
    "save",
    "sources",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name's home on first use (PEP 562) and keep the result, so that this runs once per name."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, those not yet imported included, for completion."""
    return sorted({*globals(), *__all__})
