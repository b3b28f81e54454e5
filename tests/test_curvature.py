"""The operator on named parameters against dense matrices built entry by entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.blocks.block_cases import close, random_tensor
from tests.curvature_helpers import MatrixLayout, make_curvature, make_model
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from kronfac.blocks import Block, Diagonal, Kronecker, PerFactor, Uniform
from kronfac.curvature import BlockDiagonal, Curvature
from kronfac.damping import Shift, get_rule
from kronfac.layers import adapt_model


@pytest.fixture
def curvature() -> BlockDiagonal:
    return make_curvature(make_model())


def vector_for(curvature: BlockDiagonal, seed: int = 7) -> dict[str, Tensor]:
    return {
        name: random_tensor(*shape, seed=seed + i) for i, (name, shape) in enumerate(curvature.parameter_shapes.items())
    }


def flat(curvature: BlockDiagonal, vector: dict[str, Tensor]) -> Tensor:
    return parameters_to_vector([vector[name] for name in curvature.parameter_names])


def dense_by_basis_vectors(curvature: BlockDiagonal, act: Callable[[Block, Tensor], Tensor]) -> Tensor:
    """Column by column: pack a basis vector by hand, act with one block, unpack by hand."""
    shapes = {name: tuple(shape) for name, shape in curvature.parameter_shapes.items()}
    entries = [(name, i) for name, shape in shapes.items() for i in range(torch.Size(shape).numel())]
    columns = []
    for name, i in entries:
        layer = name.split(".")[0]
        parts = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
        parts[name].view(-1)[i] = 1
        block, layout = curvature.blocks[layer], curvature.layouts[layer]
        image = layout.unpack(act(block, layout.pack(parts)))
        parts[name].zero_()
        columns.append(flat(curvature, parts | {key: part.contiguous() for key, part in image.items()}))
    return torch.stack(columns, 1)


def test_names_are_in_the_order_of_the_parameters(curvature: BlockDiagonal) -> None:
    expected = ["first.weight", "first.bias", "grouped.weight", "grouped.bias", "head.weight"]
    expected += ["last.weight", "last.bias"]
    assert list(curvature.parameter_names) == expected
    assert list(curvature.parameter_shapes) == expected
    assert Curvature is BlockDiagonal
    assert "4 layers, 7 parameters" in repr(curvature)


def test_to_dense_follows_parameters_to_vector(curvature: BlockDiagonal) -> None:
    expected = dense_by_basis_vectors(curvature, lambda block, matrix: block.matmul(matrix))
    close(curvature.to_dense(), expected)
    assert torch.linalg.matrix_rank(expected) == len(expected), "an easy matrix would prove nothing"


def test_products(curvature: BlockDiagonal) -> None:
    vector, dense = vector_for(curvature), curvature.to_dense()
    product = curvature.matmul(vector)
    assert list(product) == list(curvature.parameter_names)
    assert {name: part.shape for name, part in product.items()} == curvature.parameter_shapes
    close(flat(curvature, product), dense @ flat(curvature, vector))
    close(curvature.quadratic_form(vector), flat(curvature, vector) @ dense @ flat(curvature, vector))
    assert curvature.quadratic_form(vector).shape == ()


def test_summaries(curvature: BlockDiagonal) -> None:
    dense = curvature.to_dense()
    close(curvature.trace(), dense.trace())
    close(flat(curvature, curvature.diagonal()), dense.diagonal())
    close(curvature.frobenius_norm(), torch.linalg.matrix_norm(dense))
    close(curvature.inner(curvature.scale(0.5)), 0.5 * dense.square().sum())
    close(curvature.scale(3.0).to_dense(), 3 * dense)
    assert curvature.scale(3.0).options == curvature.options


def test_the_quadratic_form_is_differentiable(curvature: BlockDiagonal) -> None:
    vector = {name: part.requires_grad_() for name, part in vector_for(curvature).items()}
    gradients = torch.autograd.grad(curvature.quadratic_form(vector), list(vector.values()))
    product = curvature.matmul(vector)
    for gradient, part in zip(gradients, product.values(), strict=True):
        close(gradient, 2 * part.detach())


@pytest.mark.parametrize("rule", ["factored", "exact", get_rule("exact"), lambda block, damping: Uniform(2 * damping)])
def test_factorise(curvature: BlockDiagonal, rule: str | Callable[[Block, float], Shift]) -> None:
    damping = 0.3
    decide = get_rule(rule)

    def damped(block: Block, matrix: Tensor) -> Tensor:
        shift = decide(block, damping)
        if isinstance(shift, Uniform):
            return block.matmul(matrix) + shift.value * matrix
        assert isinstance(shift, PerFactor)
        input, output = block.tensors()["input"], block.tensors()["output"]
        input = torch.diag(input) if input.ndim == 1 else input
        eye_in, eye_out = (torch.eye(len(factor), dtype=torch.float64) for factor in (input, output))
        return (output + shift.output * eye_out) @ matrix @ (input + shift.input * eye_in)

    dense = dense_by_basis_vectors(curvature, damped)
    inverse = curvature.factorise(damping, rule)
    vector = vector_for(curvature)
    assert inverse.parameter_names == curvature.parameter_names
    close(flat(curvature, inverse.apply(vector)), torch.linalg.solve(dense, flat(curvature, vector)))
    close(inverse.logdet(), torch.linalg.slogdet(dense).logabsdet)
    root = torch.stack([flat(curvature, inverse.sqrt_apply(part)) for part in basis(curvature)], 1)
    close(root @ root.T, torch.linalg.inv(dense))


def basis(curvature: BlockDiagonal) -> list[dict[str, Tensor]]:
    sizes = [shape.numel() for shape in curvature.parameter_shapes.values()]
    parts = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    names = list(curvature.parameter_shapes.items())
    return [
        {name: part[i].view(shape) for (name, shape), part in zip(names, parts, strict=True)} for i in range(sum(sizes))
    ]


@pytest.mark.parametrize("method", ["matmul", "quadratic_form", "apply", "sqrt_apply"])
def test_vectors_that_do_not_fit(curvature: BlockDiagonal, method: str) -> None:
    act = getattr(curvature if hasattr(curvature, method) else curvature.factorise(0.1), method)
    vector = vector_for(curvature)
    with pytest.raises(ValueError, match=r"it lacks 'first.bias'$"):
        act({name: part for name, part in vector.items() if name != "first.bias"})
    with pytest.raises(ValueError, match=r"there is no curvature for 'uncovered.weight', 'uncovered.bias'$"):
        act(vector | {"uncovered.weight": torch.ones(2, 2), "uncovered.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(2, 3\) instead of \(3, 2\)$"):
        act(vector | {"head.weight": vector["head.weight"].T})
    with pytest.raises(TypeError, match=r"a vector is a mapping.*got Tensor"):
        act(flat(curvature, vector))


def test_a_failed_factorisation_names_the_layer(curvature: BlockDiagonal) -> None:
    broken = curvature.blocks | {"first": Kronecker(torch.zeros(4, 4).double(), torch.zeros(2, 2).double())}
    with pytest.raises(torch.linalg.LinAlgError, match=r"layer 'first' with damping 0: the input factor.*larger"):
        BlockDiagonal(broken, curvature.layouts, curvature.parameter_names).factorise(0.0)
    broken = curvature.blocks | {"last": Diagonal(torch.full((2, 2), torch.nan).double())}
    with pytest.raises(torch.linalg.LinAlgError, match=r"layer 'last'.*NaN"):
        BlockDiagonal(broken, curvature.layouts, curvature.parameter_names).factorise(0.1)


def test_damping_and_rule_are_validated(curvature: BlockDiagonal) -> None:
    with pytest.raises(ValueError, match="not negative"):
        curvature.factorise(-1.0)
    with pytest.raises(ValueError, match="unknown damping rule 'best'"):
        curvature.factorise(0.1, "best")


def test_bad_construction(curvature: BlockDiagonal) -> None:
    block = Kronecker(torch.eye(4), torch.eye(2))
    layout = MatrixLayout("first", (2, 4), True)
    names = ["first.weight", "first.bias"]
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonal({}, {}, names)
    with pytest.raises(TypeError, match="layer 'first' must be a Block, got Tensor"):
        BlockDiagonal({"first": torch.eye(2)}, {"first": layout}, names)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="no layout for the layers 'first'"):
        BlockDiagonal({"first": block}, {}, names)
    with pytest.raises(ValueError, match=r"parameter_order lacks 'first.bias'"):
        BlockDiagonal({"first": block}, {"first": layout}, names[:1])
    with pytest.raises(ValueError, match=r"'first.weight' belongs to two blocks, 'first' and 'again'"):
        BlockDiagonal({"first": block, "again": block}, {"first": layout, "again": layout}, names)
    with pytest.raises(ValueError, match="numbers of entries differ"):
        BlockDiagonal({"first": Diagonal(torch.ones(2, 5))}, {"first": layout}, names)
    adapters = adapt_model(torch.nn.ModuleDict({"first": torch.nn.Linear(3, 2)})).adapters
    with pytest.raises(ValueError, match=r"layer 'first' has shape \(5, 7\), which does not fit"):
        BlockDiagonal({"first": Diagonal(torch.ones(5, 7))}, adapters, names)
    layout.parameter_names = ("first.weight", "first.offset")
    with pytest.raises(ValueError, match=r"names \('first.weight', 'first.offset'\) and unpacks"):
        BlockDiagonal({"first": block}, {"first": layout}, names)
    layout.parameter_names = ("first.weight", "first.bias")
    with pytest.raises(TypeError, match="one dtype"):
        BlockDiagonal(
            {"first": block, "head": Diagonal(torch.ones(3, 2).double())},
            {"first": layout, "head": MatrixLayout("head", (3, 2), False)},
            [*names, "head.weight"],
        )


def test_inner_product_of_different_layers(curvature: BlockDiagonal) -> None:
    blocks = {name: block for name, block in curvature.blocks.items() if name != "last"}
    other = BlockDiagonal(blocks, curvature.layouts, curvature.parameter_names)
    with pytest.raises(ValueError, match="only one of the two curvatures has a block for 'last'"):
        curvature.inner(other)
