"""What a step of a self-tuning optimiser saw and chose."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StepReport:
    """One step, in the units of the objective ``h`` (the loss plus ``r/2 ‖θ‖²``) on its mini-batch.

    Attributes:
        step: Number of the step, from 0.
        loss: Loss before the step, without the weight decay's term.
        objective: ``h(θ)``.
        predicted: ``M(δ) − M(0)``, not positive.
        actual: ``h(θ + δ) − h(θ)``, or None where it was not measured.
        rho: Reduction ratio ``actual / predicted``, or None.
        lam: ``λ`` with which the step was taken.
        gamma: ``γ`` of the approximate curvature, on the scale of ``λ``.
        alpha: Step size: ``δ = −α Δ + μ δ_prev`` with ``Δ`` the preconditioned gradient.
        mu: Momentum.
        norm: ``‖δ‖``.
        kl: ``½ δᵀFδ``, the change of the model's distribution to second order, in nats times the loss's scale.
        rejected: Trial steps that raised the loss and were taken back.
    """

    step: int
    loss: float
    objective: float
    predicted: float
    actual: float | None
    rho: float | None
    lam: float
    gamma: float
    alpha: float
    mu: float
    norm: float
    kl: float
    rejected: int

    def to_dict(self) -> dict[str, float | None]:
        """Return all entries by name, for logs and tables."""
        return asdict(self)
