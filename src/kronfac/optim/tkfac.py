"""``TKFAC``: KFAC's step on trace-restricted Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from kronfac.approximations.tkfac import TKFACStatistic
from kronfac.damping import Rule, TraceRestricted, expansion, normal
from kronfac.layers import LayerAdapter
from kronfac.likelihoods import Likelihood
from kronfac.optim.kfac import KFAC

SCHEMES = ("normal", "trace_restricted")


class TKFAC(KFAC):
    """Natural gradient descent with the approximation that keeps the trace: Algorithm 1 of Gao et al. 2020.

    It is `KFAC` with ``approximation="tkfac"`` and one of two dampings. ``"normal"`` (TKFAC_nor) adds ``√λ`` to
    ``√δ Φ`` and ``√δ Ψ`` (equation 5.15). ``"trace_restricted"`` (TKFAC_new) keeps every trace above ``ν`` and damps
    each factor by its own mean (5.16); fully-connected layers are expanded by the largest such raise of any layer
    (5.17).
    ``damping`` (and ``weight_decay`` as curvature) then enter the blocks of normalisation layers alone.

    Args:
        model: The module that the training loop calls.
        likelihood: The loss, e.g. ``kronfac.Categorical()``.
        lr: Learning rate ``α``.
        scheme: ``"normal"`` or ``"trace_restricted"``.
        nu: ``ν``, least trace of a block under ``"trace_restricted"``.
        printed_damping: Damp by ``δ̃ / dim`` as (5.16) is printed, instead of by ``√δ̃ / dim``.
        **options: All other options of `KFAC`, but ``approximation`` and ``damping_rule``.

    Raises:
        TypeError: An option is fixed by the method, or of the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        lr: float,
        *,
        scheme: str = "normal",
        nu: float = 1e-2,
        printed_damping: bool = False,
        **options: Any,
    ) -> None:
        if fixed := sorted({"approximation", "damping_rule"} & set(options)):
            raise TypeError(f"TKFAC fixes {' and '.join(fixed)}; use kronfac.optim.KFAC to choose, or scheme=.")
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r} is unknown; choose one of {SCHEMES}.")
        restricted = TraceRestricted(nu, printed=printed_damping)
        rule = normal if scheme == "normal" else restricted
        super().__init__(model, likelihood, lr, approximation="tkfac", damping_rule=rule, **options)

    def _rules(self) -> Rule | Mapping[str, Rule]:
        rule = self._rule
        if not isinstance(rule, TraceRestricted):
            return rule
        statistics = self._estimator.statistics
        deltas = [s.delta() for s in self._ready().values() if isinstance(s, TKFACStatistic)]
        expanded = replace(rule, beta=expansion(deltas, rule.nu))
        adapters = self._estimator.adaptation.adapters
        return {name: rule if _convolves(adapters[name]) else expanded for name in statistics}


def _convolves(adapter: LayerAdapter) -> bool:
    return isinstance(adapter.module, nn.modules.conv._ConvNd)
