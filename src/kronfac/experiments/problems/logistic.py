"""The autoencoders of Martens and Grosse (2015): logistic units, sparse initialisation, weight decay of 1e-5."""

from __future__ import annotations

from functools import partial

from kronfac.experiments.models import logistic_autoencoder
from kronfac.experiments.problems.autoencoders import images
from kronfac.experiments.problems.base import Problem
from kronfac.experiments.problems.losses import bernoulli, pixel_loss, squared_errors

_on = partial(
    Problem,
    prepare=images,
    likelihood=bernoulli,
    loss=pixel_loss,
    measures={"squared_error": squared_errors},
    metric="train_squared_error",
    batch_size=1000,
    steps=500,
    evaluate_every=10,
)

_DECAY = {name: {"weight_decay": 1e-5} for name in ("adaptive_kfac", "kflr", "kfra", "hessian_free")}

FAMILY = (
    _on(
        name="mnist-logistic",
        description="MNIST through a code of 30 numbers: 784-1000-500-250-30 mirrored, logistic units, sparse start",
        dataset="mnist",
        build=partial(logistic_autoencoder, (784, 1000, 500, 250, 30)),
        tuned=_DECAY,
    ),
    _on(
        name="curves-logistic",
        description="Drawn curves through a code of 6 numbers: 784-400-200-100-50-25-6 mirrored, logistic units",
        dataset="curves",
        build=partial(logistic_autoencoder, (784, 400, 200, 100, 50, 25, 6)),
        tuned=_DECAY,
    ),
)
