"""Each backend's tests need its own dist and kernelmux, and nothing else of this repository."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

FOLDERS = sorted((Path(__file__).parents[2] / "backends").glob("*/tests"))
LIBRARIES = {"pytest", "hypothesis", "torch", "numpy", "triton", "cupy", "cupy_backends", "llvmlite", "numba"}


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_a_backends_tests_import_only_its_own_package_and_kernelmux(folder: Path):
    files = sorted(folder.glob("*.py"))
    assert files
    known = {*sys.stdlib_module_names, *LIBRARIES, "kernelmux", f"kernelmux_{folder.parent.name}"}
    known |= {file.stem for file in files}
    strange = {file.name: imported(file) - known for file in files}
    assert {name: packages for name, packages in strange.items() if packages} == {}


def test_there_is_a_folder_of_tests_a_backend():
    assert {folder.parent.name for folder in FOLDERS} >= {"cupy", "numba", "reference", "torch", "triton"}
