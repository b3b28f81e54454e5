"""Likelihoods: what a loss is, how it is weighted and normalised, and its curvature in the outputs."""

from __future__ import annotations

from kronfac.likelihoods.base import Likelihood
from kronfac.likelihoods.bernoulli import Bernoulli
from kronfac.likelihoods.categorical import Categorical
from kronfac.likelihoods.checks import Targets
from kronfac.likelihoods.elementwise import ElementwiseLikelihood
from kronfac.likelihoods.gaussian import Gaussian
from kronfac.likelihoods.joint import Joint
from kronfac.likelihoods.of import likelihood_of

__all__ = [
    "Bernoulli",
    "Categorical",
    "ElementwiseLikelihood",
    "Gaussian",
    "Joint",
    "Likelihood",
    "Targets",
    "likelihood_of",
]
