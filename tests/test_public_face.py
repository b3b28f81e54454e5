"""What `import kronfac` promises: it is light, every public name resolves, and the three lists of names agree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kronfac as kf

#: Optional dependencies, and what only the command line and the experiments need.
HEAVY = [
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "plotly",
    "pyarrow",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "typer",
]
#: The contract of the public face: examples, documentation and other people's code use these names.
CONTRACT = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "GaussNewtonOperator",
    "HessianOperator",
    "Likelihood",
    "continual.QuadraticPenalty",
    "continual.balance",
    "continual.merge_batchnorm",
    "coverage",
    "estimate",
    "likelihood_of",
    "load",
    "optim.EKFAC",
    "optim.KFAC",
    "optim.KLDWRM",
    "optim.TKFAC",
    "reference.empirical_fisher",
    "reference.fisher",
    "reference.ggn",
    "reference.hessian",
    "save",
    "verify",
]


def run_python(code: str) -> str:
    """Run code in an interpreter of its own, where nothing has been imported yet."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def names_for_type_checkers() -> set[str]:
    """Names that the `if TYPE_CHECKING:` block of the package imports."""
    tree = ast.parse(Path(kf.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.asname or alias.name for node in block.body for alias in getattr(node, "names", ())}


@pytest.mark.parametrize("name", kf.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(kf, name) is getattr(kf, name)


@pytest.mark.parametrize("path", CONTRACT)
def test_contract_names_are_callable(path: str) -> None:
    found: object = kf
    for part in path.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_lists_of_names_agree() -> None:
    assert set(kf.__all__) == set(kf._HOMES) | set(kf._SUBMODULES) == names_for_type_checkers()
    assert set(kf.__all__) <= set(dir(kf))


def test_submodules_publish_what_they_have() -> None:
    for name in sorted(kf._SUBMODULES):
        module = getattr(kf, name)
        assert module.__all__, f"kronfac.{name} names nothing public"
        for public in module.__all__:
            assert hasattr(module, public), f"kronfac.{name}.__all__ lists {public}, which it does not have"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = kf.no_such_name


def test_import_alone_loads_nothing_heavy() -> None:
    loaded = run_python("import sys, kronfac; print(*sorted({m.partition('.')[0] for m in sys.modules}))").split()
    assert not set(loaded) & {*HEAVY, "numpy"}


def test_using_the_core_loads_torch_and_nothing_optional() -> None:
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import kronfac as kf\n"
        "for name in kf.__all__: getattr(kf, name)\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    assert not set(run_python(code).split()) & set(HEAVY)


def test_import_costs_next_to_nothing_over_torch() -> None:
    code = (
        "import time, torch; start = time.perf_counter()\n"
        "import kronfac as kf\n"
        "middle = time.perf_counter(); kf.optim.KFAC; kf.Categorical\n"
        "print(middle - start, time.perf_counter() - middle)"
    )

    def is_quick() -> bool:
        alone, used = map(float, run_python(code).split())
        return alone < 0.1 and used < 1.5

    # Other processes share the machine: it may be slow twice.
    assert any(is_quick() for _ in range(3))


def test_version_agrees_with_the_installed_package() -> None:
    from importlib.metadata import version

    assert version("kronfac") == kf.__version__
