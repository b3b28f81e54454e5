"""``EKFAC``: natural gradient with second moments re-estimated in K-FAC's eigenbasis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import nn
from torch.optim import Optimizer

from kronfac.approximations import EKFAC as EKFACBlocks
from kronfac.likelihoods import Likelihood
from kronfac.optim.kfac import KFAC
from kronfac.optim.options import KFACOptions
from kronfac.sources import Source


class EKFAC(KFAC):
    """K-FAC with eigenvalues of its own: EKFAC with running averages (George et al. 2018, section 3).

    The step rule is that of :class:`kronfac.optim.KFAC`.  The eigenvectors of K-FAC's factors are renewed with period
    ``invert_every``; in their basis, running second moments of per-example gradients take the place of the products of
    eigenvalues, and enter the inverse whenever statistics are gathered, for the price of a reciprocal.  The damping is
    exact: ``λ`` is added to every second moment.

    When the eigenvectors are renewed, the running moments are carried over: they become the diagonal, in the new
    basis, of the block that they stood for in the old one, which keeps their sum.  At the first time they start from
    K-FAC's eigenvalues.

    Args:
        model: The module that the training loop calls.
        likelihood: The loss, e.g. ``kronfac.Categorical()``.
        lr: Learning rate.
        momentum: In ``[0, 1)``.
        damping: ``λ``, in units of the loss's curvature.
        weight_decay: Adds to the gradient and to the damping, unless decoupled.
        source: ``"sampled"`` (true Fisher), ``"exact"``, ``"empirical"`` or an object.
        stats_every: Period in steps of the statistics, and so of the values in the inverse.
        invert_every: Period in steps of the eigenvectors; before it, also at steps 1, 2, 4, 8, …
        ema: Decay of factors and second moments per gathered step, with bias correction.
        kl_clip: As for :class:`kronfac.optim.KFAC`.
        average: Decay of the average of iterates, in ``(0, 1)``.
        fallback: Makes the optimiser of parameters without curvature.
        generator: For the sampled labels; one with a fixed seed by default.
        **options: See :class:`kronfac.optim.options.KFACOptions`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        lr: float,
        *,
        momentum: float = 0.9,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        source: str | Source = "sampled",
        stats_every: int = 10,
        invert_every: int = 100,
        ema: float = 0.95,
        kl_clip: float | str | None = "auto",
        average: float | None = None,
        fallback: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[KFACOptions],
    ) -> None:
        super().__init__(
            model,
            likelihood,
            lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            approximation=EKFACBlocks(),
            source=source,
            damping_rule="exact",
            stats_every=stats_every,
            invert_every=invert_every,
            ema=ema,
            kl_clip=kl_clip,
            average=average,
            fallback=fallback,
            generator=generator,
            **options,
        )
