"""The oracle: dense curvature by definition, in plain `torch.func`, slow and obviously right.

It imports nothing of the rest of the package, so that the rest can be checked against it.
"""

from __future__ import annotations

from kronfac.reference.matrices import empirical_fisher, fisher, ggn, hessian, per_example_roots
from kronfac.reference.preactivation import preactivation_hessians

__all__ = ["empirical_fisher", "fisher", "ggn", "hessian", "per_example_roots", "preactivation_hessians"]
