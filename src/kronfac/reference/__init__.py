"""The oracle: dense curvature by definition, in plain `torch.func`, slow and obviously right.

It imports nothing of the rest of the package, so that the rest can be checked against it.
"""

from __future__ import annotations

from kronfac.reference.matrices import empirical_fisher, fisher, ggn, hessian, per_example_roots

__all__ = ["empirical_fisher", "fisher", "ggn", "hessian", "per_example_roots"]
