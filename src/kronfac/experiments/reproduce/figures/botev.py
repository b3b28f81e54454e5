"""Botev, Ritter & Barber (2017), KFLR and KFRA."""

from __future__ import annotations

from kronfac.experiments.reproduce.figures.base import Figure

_PAPER = "Botev et al. (2017)"
_METHODS = "kfac:sampled,kfac:sampled:factored,kfac:recursive,kfac:recursive:factored,kfac:exact"


def _alignment(key: str, where: str, problem: str) -> Figure:
    return Figure(
        key=key,
        paper=_PAPER,
        where=where,
        shows=f"cosines of approximate with exact Gauss-Newton updates along KFRA's training, {problem}",
        found="KFRA's update is aligned better than K-FAC's throughout",
        commands=(
            f"analyse alignment {problem}-logistic --steps 200 --every 50 --examples 1000 --optimizer kfra"
            f" --approximations {_METHODS}",
        ),
        small=(
            "analyse alignment digits-autoencoder --steps 10 --every 10 --examples 100 --optimizer kfra --damping 0.1"
            " --approximations kfac:sampled,kfac:recursive",
        ),
        differs="damping 0.01 throughout, where the paper follows the optimiser's own",
    )


FIGURES = (
    Figure(
        key="botev-4",
        paper=_PAPER,
        where="Figure 4",
        shows="loss against seconds of SGD, Adam, K-FAC, KFLR and KFRA on three autoencoders, on a CPU",
        found="the second-order methods are ahead of Adam and SGD, KFRA of K-FAC",
        commands=tuple(
            f"compare {problem}-logistic --optimizers sgd,adam,adaptive_kfac,kflr,kfra --seeds 0 --steps 500"
            for problem in ("curves", "faces", "mnist")
        ),
        small=("compare digits-autoencoder --optimizers adam,adaptive_kfac,kflr,kfra --seeds 0 --steps 20",),
        differs="rates of SGD and Adam are defaults: give --grid to the commands",
    ),
    _alignment("botev-5", "Figure 5", "curves"),
    _alignment("botev-6", "Figure 6", "faces"),
    _alignment("botev-7", "Figure 7", "mnist"),
)
