"""Grosse & Martens (2016), KFC."""

from __future__ import annotations

from kronfac.experiments.reproduce.figures.base import Figure

_PAPER = "Grosse & Martens (2016)"
_RACE = (
    "compare {} --optimizers sgd,kfac --seeds 0 --epochs 50 --metric train_error --grid sgd.lr=0.003,0.01,0.03"
    " --grid kfac.lr=0.003,0.01,0.03 --grid-steps 780 --set kfac.batch_size=512"
)
_SMALL = "compare digits-cnn --optimizers sgd,kfac --seeds 0 --steps 40"

FIGURES = (
    Figure(
        key="grosse-1",
        paper=_PAPER,
        where="Figures 1 and 2",
        shows="correlations of derivatives and of activations over locations and between maps",
        found="derivatives are nearly uncorrelated over space under maximum pooling, activations strongly correlated",
        commands=(
            "analyse autocorrelation cifar10-kfc-max cifar10-kfc-avg --optimizer adam --steps 19500 --examples 512",
        ),
        small=("analyse autocorrelation digits-cnn --steps 20 --examples 64",),
        differs="SVHN is left out; the paper trains for 50 epochs by SGD",
    ),
    Figure(
        key="grosse-3",
        paper=_PAPER,
        where="Figures 3 and 5",
        shows="loss and error of KFC-pre and SGD against seconds and against steps, CIFAR-10",
        found="19 % test error in 3 minutes against SGD's 9, 6 % training error in 4 against 30, on a GPU",
        commands=(_RACE.format("cifar10-kfc") + " --target 0.06",),
        small=(_SMALL,),
        differs="no response normalisation, no weight decay; damping and clip are those tuned for the problem",
    ),
    Figure(
        key="grosse-4",
        paper=_PAPER,
        where="Figure 4",
        shows="the same with batch normalisation in the network",
        found="KFC-pre is considerably faster than SGD with and without batch normalisation",
        commands=(_RACE.format("cifar10-kfc-bn"), _RACE.format("cifar10-kfc")),
        small=(_SMALL,),
        differs="as grosse-3; batch normalisation's cost counts, which the paper leaves out",
    ),
)
