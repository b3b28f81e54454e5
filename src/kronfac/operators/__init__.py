"""Matrix-free curvature: products with the Gauss-Newton matrix and the Hessian, without any approximation."""

from __future__ import annotations

from kronfac.operators.gauss_newton import GaussNewtonOperator, ggn_gram, ggn_quadratic_form
from kronfac.operators.hessian import HessianOperator
from kronfac.operators.operator import ParameterOperator

__all__ = ["GaussNewtonOperator", "HessianOperator", "ParameterOperator", "ggn_gram", "ggn_quadratic_form"]
