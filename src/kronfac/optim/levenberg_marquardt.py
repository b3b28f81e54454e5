"""Damping that follows how well the quadratic model predicts (Moré 1978; Grosse & Martens 2016, equation 38)."""

from __future__ import annotations

from dataclasses import dataclass

#: Bounds of λ; beyond them it says nothing any more.
LOWEST, HIGHEST = 1e-20, 1e20
#: One verdict changes ``λ`` by no more than this, however long its period.
STEEPEST = 0.1


@dataclass
class LevenbergMarquardt:
    """``λ ← ωλ`` where the reduction ratio ``ρ > ¾``, ``λ ← λ/ω`` where ``ρ < ¼``.

    Verdicts that keep pointing the same way are taken further: from the third on the exponent of ``ω`` doubles up to 8,
    so that a start that is off by a factor of a million is forgotten in tens of steps instead of hundreds.

    Attributes:
        value: ``λ``.
        factor: ``ω``, ``(19/20)^T`` for an adaptation every ``T`` steps (Martens & Grosse 2015, section 6.5).
        streak: Verdicts that pointed the same way in a row, negative for those to lower ``λ``.
    """

    value: float
    factor: float
    streak: int = 0

    def update(self, rho: float, lowest: float = 0.0) -> None:
        """Take in a reduction ratio.

        Args:
            rho: ``ρ``; ``-inf`` for a loss that is not finite.
            lowest: ``λ`` does not fall below this; far below the curvature along the step it says nothing.
        """
        if rho > 0.75:
            self.streak = min(self.streak, 0) - 1
        elif rho < 0.25:
            self.streak = max(self.streak, 0) + 1
        else:
            self.streak = 0
            return
        exponent = min(2 ** max(abs(self.streak) - 2, 0), 8)
        factor = max(self.factor**exponent, STEEPEST)
        self.scale(max(factor, min(lowest / self.value, 1.0)) if self.streak < 0 else 1 / factor)

    def scale(self, factor: float) -> None:
        """Multiply ``λ``, within bounds.

        Args:
            factor: By what.
        """
        self.value = min(max(self.value * factor, LOWEST), HIGHEST)
