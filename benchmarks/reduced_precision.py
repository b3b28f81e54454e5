"""Which reduced precision keeps the preconditioned direction? Cosine to float64, and time over float32.

    python benchmarks/reduced_precision.py [--device cuda] [--damping 1e-2] [--rounds 20] [--batches 1]

The deep autoencoder (784-1000-500-250-30 and back, batch 500) at its initial weights: statistics of `--batches`
batches of random images, the gradient of the last one, factored damping. The factors are of deficient rank, the
gradient lies in their range, and there the inverse is small: rounding errors elsewhere are multiplied by 1/damping.
Truth is the direction in float64 from the same statistics. Forms of the two products of a layer:

- float32, and tf32 (CUDA alone);
- bf16: both inverses and the gradient rounded to bfloat16, sums in float32;
- bf16, one side: the product with the wider factor in bfloat16, the other in float32;
- bf16, inverse split / gradient split: that operand as the sum of two bfloat16 numbers, two products for one;
- bf16, both split: three products for one;
- bf16, main part apart: what is large in the gradient in float32, `kronfac.linalg.rounded`;
- rows: in float32 from the rows that the gradient is made of, `kronfac.optim.rows`; in bf16, everything rounded; in
  bf16, means apart: the means of the rows in float32, `kronfac.linalg.rounded`;
- eigenbasis in bf16: into the eigenbasis and back by bfloat16 products, four for two, eigenvalues in float32.

A CPU's bfloat16 product rounds its result to bfloat16, too; CUDA's gives it in float32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from kronfac.blocks import KroneckerInverse
from kronfac.experiments.bench.timing import clock_of
from kronfac.experiments.bench.workloads import make
from kronfac.linalg.products import matmul
from kronfac.linalg.rounded import LEAST, RoundedProduct, Workspace
from kronfac.optim import KFAC
from kronfac.optim.rows import multiply_rows


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of matrices in bfloat16, as float32."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as the sum of two in bfloat16."""
    high = matrix.bfloat16()
    return high, (matrix - high).bfloat16()


class Layer:
    """One layer's inverses, prepared in every form, so that only products are timed."""

    def __init__(
        self,
        gradient: Tensor,
        rows: tuple[Tensor, Tensor],
        output: Tensor,
        input: Tensor,
        shifts: tuple[float, float],
    ) -> None:
        """Factorise.

        Args:
            gradient: ``[d_out, d_in]``, float32.
            rows: Cotangents and inputs, the latter without ones, that it is made of.
            output: Output factor.
            input: Input factor.
            shifts: Damping of the output and of the input factor.
        """
        self.gradient, self.rows = gradient, rows
        exact = [f.double() + s * torch.eye(len(f), dtype=torch.float64, device=f.device) for f, s in
                 zip((output, input), shifts, strict=True)]  # fmt: skip
        inverses = [torch.linalg.inv(matrix) for matrix in exact]
        self.truth = inverses[0] @ gradient.double() @ inverses[1]
        self.left, self.right = (inverse.float() for inverse in inverses)
        self.rounded = self.left.bfloat16(), self.right.bfloat16()
        self.split = split(self.left), split(self.right)
        pairs = [torch.linalg.eigh(matrix) for matrix in exact]
        self.bases = [vectors.bfloat16() for _, vectors in pairs]
        self.product, self.work = RoundedProduct(self.left, self.right), Workspace()
        self.inverse = KroneckerInverse(self.right, self.left)
        self.scale = (1.0 / torch.outer(pairs[0][0], pairs[1][0])).float()

    def plain(self) -> Tensor:
        """Two products, in float32 or tf32 as torch is set, by the library that the optimiser takes."""
        return matmul(matmul(self.left, self.gradient), self.right)

    def bf16(self) -> Tensor:
        """Everything rounded."""
        left, right = self.rounded
        return multiply(multiply(left, self.gradient.bfloat16()).bfloat16(), right)

    def one_side(self) -> Tensor:
        """The dearer product rounded."""
        if len(self.left) > len(self.right):
            return multiply(self.rounded[0], self.gradient.bfloat16()) @ self.right
        return self.left @ multiply(self.gradient.bfloat16(), self.rounded[1])

    def inverse_split(self) -> Tensor:
        """Inverses of two parts."""
        (lh, ll), (rh, rl) = self.split
        g = self.gradient.bfloat16()
        inner = (multiply(lh, g) + multiply(ll, g)).bfloat16()
        return multiply(inner, rh) + multiply(inner, rl)

    def gradient_split(self) -> Tensor:
        """Gradient, and what becomes of it, of two parts."""
        left, right = self.rounded
        gh, gl = split(self.gradient)
        ih, il = split(multiply(left, gh) + multiply(left, gl))
        return multiply(ih, right) + multiply(il, right)

    def both_split(self) -> Tensor:
        """Three products for one; the product of the two small parts is left out."""
        (lh, ll), (rh, rl) = self.split
        gh, gl = split(self.gradient)
        ih, il = split(multiply(lh, gh) + multiply(lh, gl) + multiply(ll, gh))
        return multiply(ih, rh) + multiply(ih, rl) + multiply(il, rh)

    def apart(self) -> Tensor:
        """What is large in float32; narrow layers wholly."""
        if min(self.gradient.shape) < LEAST:
            return self.plain()
        return self.product(self.left, self.right, self.gradient, None, self.work)[0]

    def by_rows(self) -> Tensor:
        """Two products with rows and one of them."""
        return _whole(multiply_rows("", self.inverse, *self.rows))

    def by_rows_bf16(self) -> Tensor:
        """The same, everything rounded."""
        cotangents, inputs = self.rows
        with_ones = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        left = multiply(cotangents.bfloat16(), self.rounded[0]).bfloat16()
        return multiply(left.mT, multiply(with_ones.bfloat16(), self.rounded[1]).bfloat16())

    def by_rows_apart(self) -> Tensor:
        """Means of the rows in float32; narrow layers wholly."""
        if min(self.gradient.shape) < LEAST:
            return self.by_rows()
        return _whole(self.product.by_rows(self.left, self.right, *self.rows, self.work))

    def eigenbasis(self) -> Tensor:
        """Through the eigenvectors."""
        left, right = self.bases
        inside = multiply(multiply(left.mT, self.gradient.bfloat16()).bfloat16(), right) * self.scale
        return multiply(multiply(left, inside.bfloat16()).bfloat16(), right.mT)


FORMS: dict[str, Callable[[Layer], Tensor]] = {
    "float32": Layer.plain,
    "tf32": Layer.plain,
    "bf16": Layer.bf16,
    "bf16, one side": Layer.one_side,
    "bf16, inverse split": Layer.inverse_split,
    "bf16, gradient split": Layer.gradient_split,
    "bf16, both split": Layer.both_split,
    "bf16, main part apart": Layer.apart,
    "eigenbasis in bf16": Layer.eigenbasis,
    "rows": Layer.by_rows,
    "rows, bf16": Layer.by_rows_bf16,
    "rows, bf16, means apart": Layer.by_rows_apart,
}


def _whole(parts: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([parts[0], parts[1].unsqueeze(1)], 1)


def layers(device: str, damping: float, batches: int) -> list[Layer]:
    """Gather statistics and a gradient.

    Args:
        device: Torch device.
        damping: ``λ``.
        batches: How many batches the statistics are of.

    Returns:
        The prepared layers.
    """
    work = make("autoencoder")
    work.model.to(device)
    optimizer = KFAC(work.model, work.likelihood, lr=0.0, damping=damping, stats_every=1, ema=0.95)
    rows: dict[str, list[Tensor]] = {}

    def keep(name: str, inputs: Tensor, output: Tensor) -> None:
        output.register_hook(lambda cotangents: rows.update({name: [cotangents, inputs]}))

    for name, module in work.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, output, name=name: keep(name, inputs[0].detach(), output))
    for seed in range(batches):
        torch.manual_seed(seed)
        x = torch.rand(500, 784, device=device)
        work.model.zero_grad()
        work.loss(work.model(x), x).backward()
        optimizer._gatherer.reset()
    found = []
    blocks = optimizer.curvature().blocks
    for name, adapter in optimizer._estimator.adaptation.adapters.items():
        block = blocks[name]
        shift = optimizer._rule(block, damping)
        packed = adapter.pack({key: p.grad for key, p in adapter.parameters.items() if p.grad is not None})
        sides = block.output, block.input  # type: ignore[attr-defined]
        found.append(Layer(packed, (rows[name][0], rows[name][1]), *sides, (float(shift.output), float(shift.input))))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, default=1)
    options = parser.parse_args()
    prepared = layers(options.device, options.damping, options.batches)
    names = [name for name in FORMS if name != "tf32" or options.device != "cpu"]
    times: dict[str, list[float]] = {name: [] for name in names}
    clock = clock_of(options.device)
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for number in range(options.rounds + 3):
            for name in names:
                torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
                start = clock()
                found[name] = [FORMS[name](layer) for layer in prepared]
                seconds = clock() - start
                if number >= 3:
                    times[name].append(seconds)
    print(f"{'form':24} {'cosine, all':>12} {'least of a layer':>17} {'over float32':>13} {'ms':>8}")
    truth = [layer.truth for layer in prepared]
    for name in names:
        each = [_cosine([f], [t]) for f, t in zip(found[name], truth, strict=True)]
        ratio = statistics.median(a / b for a, b in zip(times[name], times["float32"], strict=True))
        ms = 1e3 * statistics.median(times[name])
        print(f"{name:24} {_cosine(found[name], truth):12.6f} {min(each):17.6f} {ratio:13.2f} {ms:8.2f}")


def _cosine(found: list[Tensor], truth: list[Tensor]) -> float:
    a = torch.cat([f.double().flatten() for f in found])
    b = torch.cat([t.flatten() for t in truth])
    return float(a @ b / (a.norm() * b.norm()))


if __name__ == "__main__":
    main()
