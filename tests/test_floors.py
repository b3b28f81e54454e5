"""Imports point down only (docs/architecture.md): a module may import its own floor's package and the floors below.

On each floor the names are separate; only a package may import itself.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "kronfac"

#: From the top down. What is not listed yet must be added here before it may import anything.
FLOORS: list[set[str]] = [
    {"cli", "experiments"},
    {"optim", "continual"},
    {"analysis", "inspect", "coverage", "verification"},
    {"estimation"},
    {"examples"},
    {"estimator"},
    {"storage"},
    {"curvature", "curvature_coupled", "operators"},
    {"vectors"},
    {"approximations", "damping", "sources"},
    {"blocks", "coupling", "tape"},
    {"calls"},
    {"layers", "likelihoods", "plots"},
    {"linalg"},
    {"_typing", "broadcasts", "eager", "forwards", "graph", "measuring", "processes"},
    {"threads"},
]
HEIGHTS = {name: len(FLOORS) - i for i, names in enumerate(FLOORS) for name in names}
#: Neighbours on one floor that may nevertheless import each other in this one direction.
SIDEWAYS = {
    ("cli", "experiments"),
    ("analysis", "inspect"),  # both compare blocks with exact roots
    ("inspect", "coverage"),
    ("inspect", "verification"),
    ("approximations", "sources"),  # an approximation says what it needs of a source
}
FACE = "__init__"  # the package's own face imports everybody, lazily


def modules() -> dict[str, Path]:
    """Dotted name of every file."""
    names = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == FACE else parts)] = path
    return names


MODULES = modules()


def runtime_imports(tree: ast.Module, package: str) -> set[str]:
    """Absolute dotted names of the kronfac modules imported at runtime, inside functions too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            # ``from package import module`` needs the module; the package is only on the way.
            found.update(members if members <= MODULES.keys() else {base, *members})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {name for name in found if name == "kronfac" or name.startswith("kronfac.")}


def imports_of(name: str, path: Path) -> set[str]:
    package = name if path.stem == FACE else name.rpartition(".")[0]
    return runtime_imports(ast.parse(path.read_text(encoding="utf-8"), str(path)), package)


def unit(name: str) -> str:
    """The package or module right under kronfac that a dotted name belongs to; "" for kronfac itself."""
    return name.split(".")[1] if "." in name else ""


UNITS = {unit(name) for name in MODULES} - {""}


def violations(name: str, imported: set[str]) -> list[str]:
    """What is wrong with the imports of one module."""
    source = unit(name)
    faults = []
    for target in sorted({unit(item) for item in imported if unit(item) in UNITS} - {source}):
        if source == "reference":
            faults.append(f"{name} imports {target}; the oracle imports nothing of the rest")
        elif target == "reference":
            # The oracle is below everything, so that checks may compare against it.
            continue
        elif source not in HEIGHTS or target not in HEIGHTS:
            faults.append(f"{name} imports {target}: one of the two has no floor in tests/test_floors.py")
        elif HEIGHTS[target] >= HEIGHTS[source] and (source, target) not in SIDEWAYS:
            faults.append(f"{name} imports {target}, which is not below it")
    return faults


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("kronfac", "kronfac.__main__")])
def test_imports_point_down(name: str) -> None:
    assert violations(name, imports_of(name, MODULES[name])) == []


def test_no_import_circles() -> None:
    """At import time, module by module; an import inside a function cannot make a circle then."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = [ast.Pass()]
        package = name if path.stem == FACE else name.rpartition(".")[0]
        # A package's face gathers its own modules, which may not import the face back: that shows as a circle here.
        graph[name] = {
            item for item in runtime_imports(tree, package) if item in MODULES and item not in (name, "kronfac")
        }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_the_test_can_fail() -> None:
    assert violations("kronfac.blocks.dense", {"kronfac.curvature"})
    assert violations("kronfac.reference.ggn", {"kronfac.likelihoods.base"})
    assert violations("kronfac.sources.base", {"kronfac.damping"})
    assert not violations("kronfac.damping.rules", {"kronfac.blocks", "kronfac.damping.other"})
    tree = ast.parse("from .. import curvature\nfrom .base import Block\ndef f():\n    import kronfac.storage")
    assert {unit(name) for name in runtime_imports(tree, "kronfac.blocks")} >= {"curvature", "blocks", "storage"}
    tree = ast.parse("if TYPE_CHECKING:\n    import kronfac.optim\nelse:\n    import kronfac.tape")
    assert runtime_imports(tree, "kronfac.blocks") == {"kronfac.tape"}
