"""Bad input is refused in one sentence that names the thing and its value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kronfac.likelihoods import Bernoulli, Categorical, ElementwiseLikelihood, Gaussian

NAN = torch.full((2, 3), torch.nan)
Z = torch.zeros(2, 3)
ZZ = torch.zeros(2, 3, 3)


class AddedUp(ElementwiseLikelihood):
    """What a user writes who thinks of examples, not of outputs."""

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.exp() - labels * outputs).sum(1)

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(outputs.exp(), generator=generator)

    def curvature(self, outputs: Tensor) -> Tensor:
        return outputs.exp().sum(1, keepdim=True)


Y = torch.tensor([0, 2])

CONSTRUCTIONS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "unknown reduction": (lambda: Categorical(reduction="avg"), ValueError, "'mean', 'batchmean', 'sum'.*'avg'"),
    "no reduction": (lambda: Gaussian(reduction="none"), ValueError, "got 'none'"),
    "smoothing": (lambda: Categorical(label_smoothing=-0.1), ValueError, r"label_smoothing.*\[0, 1\].*-0.1"),
    "negative weight": (lambda: Categorical(weight=torch.tensor([1.0, -2.0])), ValueError, "weight.*not negative.*-2"),
    "NaN weight": (lambda: Bernoulli(pos_weight=torch.tensor([torch.nan])), ValueError, "pos_weight must be finite"),
    "integer weight": (lambda: Categorical(weight=torch.tensor([1, 2])), TypeError, "weight.*torch.int64"),
    "list weight": (lambda: Categorical(weight=[1.0]), TypeError, "weight must be a tensor.*list"),
    "weight matrix": (lambda: Categorical(weight=torch.ones(2, 2)), ValueError, r"weight must have shape \[C\]"),
    "ignore_index": (lambda: Categorical(ignore_index=1.0), TypeError, "ignore_index.*1.0"),
    "smoothing kind": (lambda: Categorical(label_smoothing="0.1"), ValueError, r"label_smoothing.*\[0, 1\].*'0.1'"),
    "smoothing truth": (lambda: Categorical(label_smoothing=True), ValueError, r"label_smoothing.*\[0, 1\].*True"),
    "class_dim truth": (lambda: Categorical(class_dim=True), ValueError, "class_dim must be None, 1 or -1, got True"),
    "class_dim kind": (lambda: Categorical(class_dim=1.0), ValueError, "class_dim must be None, 1 or -1, got 1.0"),
    "class_dim": (lambda: Categorical(class_dim=2), ValueError, "class_dim must be None, 1 or -1, got 2"),
    "variance": (lambda: Gaussian(variance=0.0), ValueError, "variance must be positive and finite, got 0.0"),
    "variance kind": (lambda: Gaussian(variance="1"), TypeError, "variance must be a number, got str"),
}

VALIDATIONS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "outputs no tensor": (lambda: Gaussian().validate((Z,)), TypeError, "outputs must be a tensor, got tuple"),
    "outputs integer": (lambda: Gaussian().validate(Y), TypeError, "floating-point dtype, got torch.int64"),
    "outputs one-dimensional": (lambda: Categorical().validate(torch.zeros(3)), ValueError, r"\[B, C\].*\(3,\)"),
    "outputs empty": (lambda: Gaussian().validate(torch.zeros(0, 3)), ValueError, r"\(0, 3\) hold no element"),
    "outputs NaN": (lambda: Categorical().validate(NAN, Y), ValueError, r"outputs of shape \(2, 3\) hold 6 NaN or Inf"),
    "one class": (lambda: Categorical().validate(torch.zeros(3, 1)), ValueError, "1 class.*use Bernoulli"),
    "weights of other classes": (
        lambda: Categorical(torch.ones(4)).validate(Z, Y),
        ValueError,
        r"weight has 4 classes, outputs of shape \(2, 3\) have 3",
    ),
    "classes nowhere": (lambda: Categorical().validate(ZZ), ValueError, r"\(2, 3, 3\) without targets.*class_dim=1"),
    "classes ambiguous": (
        lambda: Categorical().validate(ZZ, torch.zeros(2, 3, dtype=torch.long)),
        ValueError,
        r"with targets of shape \(2, 3\) leave open.*class_dim=-1",
    ),
    "targets shape": (lambda: Categorical().validate(Z, Y[:1]), ValueError, r"must have shape \(2,\).*got \(1,\)"),
    "one-hot integers": (lambda: Categorical().validate(Z, Z.long()), ValueError, "torch.int64 are class indices"),
    "boolean targets": (lambda: Categorical().validate(Z, Y > 0), TypeError, "class indices.*torch.bool"),
    "float indices": (lambda: Categorical().validate(Z, Y.float()), ValueError, "torch.float32 are probabilities"),
    "class too large": (lambda: Categorical().validate(Z, Y + 5), ValueError, "from 0 to 2.*got 5$"),
    "class negative": (lambda: Categorical().validate(Z, Y - 100), ValueError, "got -100.*pass ignore_index=-100"),
    "other than ignored": (lambda: Categorical(ignore_index=-1).validate(Z, Y - 2), ValueError, "got -2"),
    "probability negative": (lambda: Categorical().validate(Z, Z - 0.5), ValueError, r"\[0, 1\], got -0.5"),
    "probability NaN": (lambda: Categorical().validate(Z, NAN), ValueError, "targets.*NaN"),
    "ignored class with probabilities": (
        lambda: Categorical(ignore_index=1).validate(Z, Z),
        ValueError,
        "ignore_index=1 has no meaning for targets that are probabilities",
    ),
    "targets missing": (
        lambda: Categorical(ignore_index=-100).validate(Z),
        ValueError,
        r"Categorical\(ignore_index=-100, reduction='mean'\) depends on the targets",
    ),
    "pos_weight needs targets": (
        lambda: Bernoulli(pos_weight=torch.ones(3)).sample_cotangents(Z),
        ValueError,
        "depends on the targets",
    ),
    "loss without targets": (lambda: Gaussian().loss(Z, (None, Z)), ValueError, "loss of Gaussian needs targets"),
    "nothing counts": (
        lambda: Categorical(ignore_index=-100).validate(Z, Y * 0 - 100),
        ValueError,
        "no term of this batch of 2 counts.*batchmean",
    ),
    "coin": (lambda: Bernoulli().validate(Z, Z + 2), ValueError, r"Bernoulli takes targets in \[0, 1\], got 2"),
    "coin NaN": (lambda: Bernoulli().validate(Z, NAN), ValueError, "targets of shape.*NaN"),
    "coin shape": (lambda: Bernoulli().validate(Z, Z[0]), ValueError, r"\(3,\) do not fit.*Bernoulli takes \(2, 3\)"),
    "weight shape": (
        lambda: Bernoulli(weight=torch.ones(4)).loss(Z, Z),
        ValueError,
        r"weight of shape \(4,\) does not broadcast to outputs of shape \(2, 3\)",
    ),
    "squared shape": (lambda: Gaussian().loss(Z, Z[:, :1]), ValueError, r"\(2, 1\) do not fit outputs"),
    "squared Inf": (lambda: Gaussian().validate(Z, Z + torch.inf), ValueError, "targets.*6 NaN or Inf, first inf"),
    "squared complex": (lambda: Gaussian().loss(Z, Z + 1j), TypeError, "targets must be real.*complex64"),
    "coins complex": (lambda: Bernoulli().loss(Z, Z + 1j), TypeError, "targets must be real.*complex64"),
    "mask complex": (lambda: Gaussian().loss(Z, (Z, Z + 1j)), TypeError, "mask must be real.*complex64"),
    "nll added up": (lambda: AddedUp().loss(Z, Z), ValueError, r"AddedUp.nll.*each term, here \(2, 3\).*\(2,\)"),
    "curvature of a row": (
        lambda: next(AddedUp().root_columns(Z)),
        ValueError,
        r"AddedUp.curvature.*each output, \(2, 3\).*\(2, 1\)",
    ),
    "mask shape": (lambda: Gaussian().loss(Z, (Z, torch.ones(3))), ValueError, r"mask of shape \(3,\) does not fit"),
    "mask negative": (lambda: Gaussian().validate(Z, (Z, Z - 1)), ValueError, "mask must not be negative, got -1"),
    "mask NaN": (lambda: Gaussian().validate(Z, (Z, NAN)), ValueError, "mask weights.*NaN"),
    "targets odd": (lambda: Gaussian().loss(Z, "abc"), TypeError, "tensor or a pair.*str"),
    "product shape": (lambda: Categorical().hessian_product(Z, Y), ValueError, r"\(2, 3\), got \(2,\)"),
    "KL shape": (lambda: Bernoulli().symmetric_kl(Z, Z[:1]), ValueError, r"\(2, 3\), got \(1, 3\)"),
}
EVERYTHING = CONSTRUCTIONS | VALIDATIONS


@pytest.mark.parametrize(("call", "kind", "message"), EVERYTHING.values(), ids=EVERYTHING)
def test_refusals(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_generator_elsewhere() -> None:
    with pytest.raises(ValueError, match="generator is on cpu and outputs on meta"):
        Categorical().sample_cotangents(torch.zeros(2, 3, device="meta"), generator=torch.Generator())


def test_good_input_passes() -> None:
    Categorical().validate(Z, Y)
    Categorical(ignore_index=-100).validate(Z, torch.tensor([0, -100]))
    Categorical(ignore_index=-100, reduction="sum").validate(Z, torch.tensor([-100, -100]))
    Categorical(class_dim=-1).validate(ZZ)
    Bernoulli().validate(Z, Z.bool())
    Gaussian().validate(Z, (torch.cat([NAN[:1], Z[:1]]), torch.tensor([False, True])))


def test_repr_says_the_options() -> None:
    assert repr(Categorical(torch.ones(3), -100, 0.1, "sum", 1)) == (
        "Categorical(weight of 3 classes, ignore_index=-100, label_smoothing=0.1, class_dim=1, reduction='sum')"
    )
    assert repr(Bernoulli(pos_weight=torch.ones(3))) == "Bernoulli(pos_weight of shape (3,), reduction='batchmean')"
    assert repr(Gaussian(0.5, "mean")) == "Gaussian(variance=0.5, reduction='mean')"
