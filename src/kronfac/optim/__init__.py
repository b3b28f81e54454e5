"""Optimisers: ``torch.optim.Optimizer`` subclasses, each a composition of curvature refresh, damping and step rule."""

from __future__ import annotations

from kronfac.optim.kfac import KFAC

__all__ = ["KFAC"]
