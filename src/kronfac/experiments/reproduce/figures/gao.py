"""Gao et al. (2020), TKFAC. Learning rates and dampings are those of its Table 2."""

from __future__ import annotations

from kronfac.experiments.reproduce.figures.base import Figure

_PAPER = "Gao et al. (2020)"
_SECOND_ORDER = ("kfac", "tkfac")


def _set(*names: str, **values: object) -> str:
    return " ".join(f"--set {name}.{key}={value}" for name in names for key, value in values.items())


_REFRESH = {"stats_every": 100, "invert_every": 100}
_CONSTANT = {"lr": 0.001, "damping": 0.001, "kl_clip": "none", **_REFRESH}
_CROPS = {"crop_padding": 4, "mirror": "true"}


def _drops(epochs: int) -> dict[str, object]:
    return {"schedule": "step", "lr_drop_epochs": epochs, **_CROPS}


def _table(problem: str, sgd: float, adam: float, nu: float) -> tuple[str, str]:
    """Table 1 for one network: all methods, then TKFAC with its other damping, which is a setting of the same name."""
    command = f"compare {problem} --seeds 0,1,2 --epochs 200 --metric test_error"
    first_order = f"{_set('sgd', lr=sgd, **_drops(60))} {_set('adam', lr=adam, **_drops(60))}"
    second_order = _set(*_SECOND_ORDER, **_CONSTANT, **_drops(40))
    restricted = _set("tkfac", scheme="trace_restricted", nu=nu, **_CONSTANT, **_drops(40))
    return (
        f"{command} --optimizers sgd,adam,kfac,tkfac {first_order} {second_order}",
        f"{command} --optimizers tkfac {restricted}",
    )


# TKFAC with what K-FAC was tuned to on the digits.
_AS_KFAC = _set("tkfac", lr=0.03, damping=0.003, kl_clip=0.03, invert_every=20)
_SMALL = f"compare digits-cnn --optimizers sgd,adam,kfac,tkfac --seeds 0 --steps 40 --metric test_error {_AS_KFAC}"

FIGURES = (
    Figure(
        key="gao-1",
        paper=_PAPER,
        where="Figure 1",
        shows="a layer's exact Fisher matrix, TKFAC's, and the error",
        found="TKFAC's matrix is very close to the exact one",
        commands=(
            "analyse matrices mnist14-mlp --layer 2 --layer 4 --layer 6 --approximations kfac,tkfac --train-steps 500"
            " --examples 500",
        ),
        small=("analyse matrices digits-mlp --layer 2 --approximations kfac,tkfac --train-steps 20 --examples 64",),
        differs="at which step the paper looks is not said",
    ),
    Figure(
        key="gao-2",
        paper=_PAPER,
        where="Figure 2",
        shows="the sum of all layers' approximation errors while the network of Figure 1 is trained",
        found="TKFAC's error is below K-FAC's throughout",
        commands=("analyse training mnist14-mlp --steps 500 --every 25 --approximations kfac,tkfac",),
        small=("analyse training digits-mlp --steps 20 --every 10 --approximations kfac,tkfac",),
        differs="the paper follows TKFAC's training; ours is Adam's unless --optimizer says otherwise",
    ),
    Figure(
        key="gao-3",
        paper=_PAPER,
        where="Figure 3",
        shows="damping over the mean of each factor's diagonal, and traces, for layers of ResNet-20",
        found="damping outweighs the curvature in convolutions, and not in the fully-connected layer",
        commands=(
            "analyse damping cifar10-resnet20 --approximation tkfac --rules normal,trace_restricted --steps 3900"
            " --every 100 --examples 128 --optimizer tkfac --set lr=0.001 --set stats_every=100 --set invert_every=100"
            " --set kl_clip=none --damping 0.001",
        ),
        small=("analyse damping digits-cnn --approximation tkfac --rules normal --steps 10 --every 5 --examples 64",),
        differs="ten epochs; no augmentation",
    ),
    Figure(
        key="gao-4",
        paper=_PAPER,
        where="Figures 4 and 9",
        shows="reconstruction error of an autoencoder on MNIST, against epochs and seconds",
        found="TKFAC lowers the error faster than K-FAC, Adam and SGD, in epochs and in seconds",
        commands=(
            "compare mnist-autoencoder --optimizers sgd,adam,kfac,tkfac --seeds 0 --epochs 200"
            " --grid sgd.lr=0.0003,0.001,0.003 --grid adam.lr=0.0003,0.001,0.003 --grid kfac.lr=0.01,0.03,0.1"
            " --grid tkfac.lr=0.01,0.03,0.1 --grid-steps 480 "
            + _set(*_SECOND_ORDER, damping=0.03, kl_clip="auto", **_REFRESH),
        ),
        small=(
            "compare digits-autoencoder --optimizers sgd,adam,kfac,tkfac --seeds 0 --steps 40 "
            + _set("tkfac", lr=0.3, momentum=0.8, damping=0.01, kl_clip=0.1, invert_every=20),
        ),
        differs="784-1000-500-250-30 mirrored, where the paper has a second layer of 30; losses are summed over pixels,"
        " so that learning rates are searched anew; the default clip",
    ),
    Figure(
        key="gao-5",
        paper=_PAPER,
        where="Figures 5 and 10",
        shows="training loss and test accuracy of VGG-16 on CIFAR-10, constant learning rates",
        found="TKFAC's loss falls fastest in the first epochs; all but Adam end alike",
        commands=(
            "compare cifar10-vgg16 --optimizers sgd,adam,kfac,tkfac --seeds 0 --epochs 200 "
            f"--set sgd.lr=0.01 --set adam.lr=0.001 {_set(*_SECOND_ORDER, **_CONSTANT)}",
        ),
        small=(_SMALL,),
        differs="whether the paper's network has batch normalisation is not said (cifar10-vgg16-bn has it)",
    ),
    Figure(
        key="gao-6",
        paper=_PAPER,
        where="Figure 6 and Table 1, CIFAR-10",
        shows="test accuracy with falling learning rates; TKFAC with both dampings",
        found="VGG-16: SGD 91.77, Adam 92.57, K-FAC 92.70, TKFAC 93.33 and 93.42 %; ResNet-20: 92.78, 93.57, 93.69,"
        " 93.76 and 94.66 %",
        commands=(
            *_table("cifar10-vgg16", 0.03, 0.0003, 1.0),
            *_table("cifar10-resnet20", 0.03, 0.001, 0.01),
        ),
        small=(
            _SMALL,
            f"compare digits-cnn --optimizers tkfac --seeds 0 --steps 40 {_AS_KFAC}"
            " --set tkfac.scheme=trace_restricted",
        ),
        differs="crops and mirror images are assumed, as is usual; CIFAR-100 is the same with cifar100-vgg16"
        " and cifar100-resnet20",
    ),
    Figure(
        key="gao-7",
        paper=_PAPER,
        where="Figures 7 and 8",
        shows="correlations of products of activation and derivative between locations, ResNet-32",
        found="products are very weakly correlated, from the start to step 10,000",
        commands=(
            "analyse locations cifar10-resnet32 --layers conv,stages.7.conv1,stages.12.conv2 --steps 0,5000,10000"
            " --optimizer tkfac",
        ),
        small=("analyse locations digits-cnn --steps 0,10 --examples 32 --entries 8",),
        differs="which three convolutions the paper shows is not said",
    ),
)
