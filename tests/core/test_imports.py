"""Imports run in flow order only, and core knows no backend: read from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernelmux

FLOW = (
    "errors",
    "formats",
    "device",
    "weights",
    "ops",
    "graph",
    "rewrite",
    "models",
    "hookspecs",
    "registry",
    "grammar",
    "policy",
    "memory",
    "choice",
    "selection",
    "schedule",
    "requirements",
    "plan",
    "policy_check",
    "lock",
    "walk",
    "capture",
    "walker",
    "state",
    "session",
    "sampling",
    "generate",
    "model",
    "bench",
    "conformance",
    "cli",
    "__main__",
)
"""Stages in the order of the flow: each imports only from those before it."""

ROOT = Path(kernelmux.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
BACKEND_FRAMEWORKS = ("cupy", "triton", "numba")


def _imports(tree: ast.AST, type_checking: bool) -> Iterator[tuple[int, str]]:
    """The line and full name of everything imported under a node, at any depth.

    `from a import b` gives `a.b`. Blocks of `if TYPE_CHECKING:` count only where asked.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not type_checking:
            yield from (found for other in node.orelse for found in _imports(other, type_checking))
        else:
            yield from _imports(node, type_checking)


def _stage(name: str) -> str | None:
    """The stage that a full name belongs to; None where it is not kernelmux's, or only the package itself."""
    package, _, rest = name.partition(".")
    stage = rest.partition(".")[0]
    known = (ROOT / stage).is_dir() or (ROOT / f"{stage}.py").is_file()
    return stage if package == "kernelmux" and stage and known else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_stages_before_its_own(path: Path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the package itself, which hands out `load` and `Model`: the test below
    for line, name in _imports(ast.parse(path.read_text()), type_checking=False):
        stage = _stage(name)
        assert stage is None or FLOW.index(stage) <= FLOW.index(own), f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_no_backend_and_none_of_their_frameworks(path: Path):
    for line, name in _imports(ast.parse(path.read_text()), type_checking=True):
        package = name.partition(".")[0]
        allowed = not package.startswith("kernelmux_") and package not in BACKEND_FRAMEWORKS
        assert allowed, f"{path.name}:{line} imports {name}"


def test_the_package_imports_only_the_model_and_only_when_asked():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    lazy = {_stage(name) for _, name in _imports(tree, type_checking=False)} - {None}
    at_top = {
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for _, name in _imports(ast.Module([node], []), type_checking=False)
    }
    assert lazy == {"model"}
    assert {name.partition(".")[0] for name in at_top} <= {"__future__", "typing"}


def test_every_stage_has_its_place_in_the_flow():
    stages = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert stages <= set(FLOW), f"add to FLOW, where they belong: {sorted(stages - set(FLOW))}"
