"""Which exact form is the cheapest on a GPU: second moments of ResNet-50's convolutions, and inverses by width.

    python benchmarks/gpu_forms.py [--batch 256] [--rounds 5] [--device cuda]

Moments: whole patches (im2col and one product) against the row-correlation form, in float32 and from bfloat16 inputs.
Inverses, in float32: Cholesky and `cholesky_inverse`, one by one and twelve at once; the triangle's inverse by
`solve_triangular` and one product; all of it in products (`kronfac.linalg.by_products`); `torch.linalg.inv`. With
``--only inverses`` these alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from kronfac.experiments.bench.timing import clock_of, timed
from kronfac.layers import adapt_model
from kronfac.layers.conv import ConvAdapter
from kronfac.layers.conv_moments import add_row_correlation_, add_whole_patches_
from kronfac.linalg.by_products import invert_by_products_
from kronfac.linalg.symmetric import add_gram_

MODEL_SIZE = 224


def milliseconds(rounds: int, device: str, function: Callable[..., object], *arguments: object) -> float:
    """Median time of a call, after two that warm up."""
    clock = clock_of(device)
    times = [timed(lambda: function(*arguments), clock) for _ in range(rounds + 2)]
    return 1e3 * statistics.median(times[2:])


def convolutions(batch: int) -> dict[tuple[object, ...], tuple[int, ConvAdapter, tuple[int, ...]]]:
    """Distinct convolutions of ResNet-50 with kernels, how often each is there, and its input's shape."""
    from kronfac.experiments.models import resnet50

    model, shapes = resnet50(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            module.register_forward_pre_hook(lambda m, inputs, name=name: shapes.update({name: inputs[0].shape}))
    adapters = adapt_model(model).adapters
    model.to("meta")(torch.empty(batch, 3, MODEL_SIZE, MODEL_SIZE, device="meta"))
    found: dict[tuple[object, ...], tuple[int, ConvAdapter, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        adapter = adapters[name]
        assert isinstance(adapter, ConvAdapter)
        count = found.get((tuple(shape), adapter.geometry), (0,))[0]
        found[tuple(shape), adapter.geometry] = (count + 1, adapter, tuple(shape))
    return found


def moments(batch: int, rounds: int, device: str) -> None:
    """Print the forms of each convolution."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    for count, adapter, shape in convolutions(batch).values():
        total = torch.zeros(1, adapter.d_in, adapter.d_in, device=device)
        line = f"{count} x {shape} stride {adapter.geometry.stride[0]}:"
        for dtype in dtypes:
            x = torch.randn(shape, device=device, dtype=dtype)
            for name, form in (("patches", add_whole_patches_), ("rows", add_row_correlation_)):
                ms = milliseconds(rounds, device, form, total, x, adapter.geometry)
                line += f"  {str(dtype)[6:]} {name} {ms:.2f}"
        print(line, "ms", flush=True)
    for width, rows in ((256, 802_816), (1024, 50_176), (2048, 50_176), (3072, 8192)):
        total, line = torch.zeros(width, width, device=device), f"gram of [{rows * batch // 256}, {width}]:"
        for dtype in dtypes:
            x = torch.randn(rows * batch // 256, width, device=device, dtype=dtype)
            line += f"  {str(dtype)[6:]} {milliseconds(rounds, device, add_gram_, total, x):.2f}"
            if dtype == torch.float32:
                line += f" (one product {milliseconds(rounds, device, total.addmm_, x.T, x):.2f})"
        print(line, "ms", flush=True)


def by_triangle(matrix: Tensor) -> Tensor:
    """Inverse from the inverse of Cholesky's factor."""
    factor = torch.linalg.cholesky_ex(matrix)[0]
    eye = torch.eye(matrix.shape[-1], device=matrix.device).expand_as(matrix)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse.mT @ inverse


def in_products(matrix: Tensor) -> Tensor:
    """Inverse as kronfac makes it on a GPU."""
    work = matrix.clone().view(-1, *matrix.shape[-2:])
    invert_by_products_(work)
    return work


def inverses(widths: tuple[int, ...], rounds: int, device: str) -> None:
    """Print the forms for each width."""
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "cholesky": lambda m: torch.linalg.cholesky_ex(m)[0],
        "cholesky and cholesky_inverse": lambda m: torch.cholesky_inverse(torch.linalg.cholesky_ex(m)[0]),
        "by triangle": by_triangle,
        "in products": in_products,
    }
    if device == "cuda":  # on the CPU its batched form fails after torch.set_num_threads
        forms["inv"] = torch.linalg.inv
    for width in widths:
        rows = torch.randn(width, 2 * width, device=device)
        one = rows @ rows.T / (2 * width) + 0.1 * torch.eye(width, device=device)
        for many, count in ((one, 1), (one.expand(12, -1, -1).contiguous(), 12)):
            if count * width > 12 * 1100 and count > 1 and width > 3100:
                continue
            line = f"width {width}, {count} at once, ms each:"
            for name, form in forms.items():
                line += f"  {name} {milliseconds(rounds, device, form, many) / count:.2f}"
            print(line, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--widths", default="65,257,577,769,1153,2305,3073,4609")
    parser.add_argument("--only", choices=("moments", "inverses"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        if options.only != "inverses":
            moments(options.batch, options.rounds, options.device)
        if options.only == "moments":
            return
        inverses(tuple(map(int, options.widths.split(","))), options.rounds, options.device)


if __name__ == "__main__":
    main()
