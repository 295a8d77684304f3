"""Imports run one way, between folders and between files, and core knows no backend: read from the source alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kernelmux

ROOT = Path(kernelmux.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
BACKEND_FRAMEWORKS = ("cupy", "triton", "numba")


def _imports(tree: ast.AST, type_checking: bool) -> Iterator[tuple[int, str]]:
    """The line and full name of everything imported under a node, at any depth, so that lazy imports count too.

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


def _file(name: str) -> Path | None:
    """The file that a full name comes from; None where it is not kernelmux's."""
    package, *parts = name.split(".")
    if package != "kernelmux":
        return None
    for end in range(len(parts), -1, -1):
        at = ROOT.joinpath(*parts[:end])
        for file in (at.with_suffix(".py"), at / "__init__.py"):
            if file.is_file():
                return file
    return None


def _files(path: Path) -> set[Path]:
    """The other files of kernelmux that a file imports when it runs."""
    names = (name for _, name in _imports(ast.parse(path.read_text()), type_checking=False))
    return {file for name in names if (file := _file(name)) is not None} - {path}


def _folder(path: Path) -> str:
    """The stage that a file belongs to: its folder, or its own name where it lies beside the folders."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _stages() -> dict[str, set[str]]:
    """Each folder, and those that its files import from; the package itself only hands out `load` and `Model`."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        if path != ROOT / "__init__.py":
            own = _folder(path)
            found.setdefault(own, set()).update({_folder(f) for f in _files(path)} - {own, "__init__"})
    return found


def test_folders_import_one_way():
    """Were there a circle, no order of reading would follow the data."""
    assert list(TopologicalSorter(_stages()).static_order())


def test_the_flow_that_the_readme_tells_is_the_order_of_imports():
    readme = (ROOT.parents[1] / "README.md").read_text("utf-8")
    told = re.search(r"core/kernelmux/ +((?:[a-z]+/\s+)+)", readme)
    assert told, "README.md names the folders of core/kernelmux/ in the order of the flow"
    order = [name.removesuffix("/") for name in told[1].split()]
    stages = _stages()
    assert set(order) == {name for name in stages if (ROOT / name).is_dir()}
    for place, name in enumerate(order):
        later = stages[name] & set(order[place:])
        assert not later, f"{name} imports from {sorted(later)}, which the flow has after it"


def test_no_two_files_import_each_other():
    try:
        TopologicalSorter({path: _files(path) for path in MODULES}).prepare()
    except CycleError as error:
        circle = " -> ".join(str(path.relative_to(ROOT)) for path in error.args[1])
        pytest.fail(f"files import in a circle: {circle}")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_no_backend_and_none_of_their_frameworks(path: Path):
    for line, name in _imports(ast.parse(path.read_text()), type_checking=True):
        package = name.partition(".")[0]
        allowed = not package.startswith("kernelmux_") and package not in BACKEND_FRAMEWORKS
        assert allowed, f"{path.name}:{line} imports {name}"


def test_the_package_imports_only_the_model_and_the_error_and_only_when_asked():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    at_top = {
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for _, name in _imports(ast.Module([node], []), type_checking=False)
    }
    assert {str(file.relative_to(ROOT)) for file in _files(ROOT / "__init__.py")} == {"errors.py", "run/model.py"}
    assert {name.partition(".")[0] for name in at_top} <= {"__future__", "typing"}
