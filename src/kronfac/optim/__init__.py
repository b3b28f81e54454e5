"""Optimisers: ``torch.optim.Optimizer`` subclasses, each a composition of curvature refresh, damping and step rule."""

from __future__ import annotations

from kronfac.optim.adaptive import AdaptiveKFAC
from kronfac.optim.ekfac import EKFAC
from kronfac.optim.gauss_newton import KFLR, KFRA
from kronfac.optim.growing_batches import GrowingBatches
from kronfac.optim.health import LayerHealth
from kronfac.optim.hessian_free import HessianFree
from kronfac.optim.kfac import KFAC
from kronfac.optim.kldwrm import KLDWRM
from kronfac.optim.report import StepReport
from kronfac.optim.tkfac import TKFAC

__all__ = [
    "EKFAC",
    "KFAC",
    "KFLR",
    "KFRA",
    "KLDWRM",
    "TKFAC",
    "AdaptiveKFAC",
    "GrowingBatches",
    "HessianFree",
    "LayerHealth",
    "StepReport",
]
