"""Lee et al. (2020), XK-FAC; the appendix alone is at hand."""

from __future__ import annotations

from kronfac.experiments.reproduce.figures.base import Figure

FIGURES = (
    Figure(
        key="lee-2",
        paper="Lee et al. (2020)",
        where="Figures 2 to 6",
        shows="target against average accuracy over a grid of learning rates and dampings, with and without α_s, α_t",
        found="with them both accuracies are correlated more",
        commands=(
            "continual permuted-mnist14-bn --tasks 4 --steps 200 --held-out 5000 --strategies online-xkfac,merged-kfac"
            " --grid lr=0.0003,0.001,0.003,0.01 --grid damping=0,0.01,0.1 --grid strength=1 --balance adaptive,none",
        ),
        small=(
            "continual permuted-digits-bn --tasks 2 --steps 10 --held-out 100 --strategies online-xkfac"
            " --grid lr=0.001,0.01 --grid damping=0,0.1 --grid strength=1 --balance adaptive,none",
        ),
        differs="permuted MNIST at 14 x 14 pixels; how α is computed is our reconstruction",
    ),
)
