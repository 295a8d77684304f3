"""What README.md and docs/ show works: Python runs against the real model, TOML is a policy that plans.

The Python blocks of one document run in order in one process, in a folder that holds `model.gguf` and `policy.toml`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from command import TIMEOUT, clean_environment
from kernelmux.contract.device import ENTRY_POINTS
from kernelmux.policy.policy import parse_policy

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("**/*.md"))]
GROUPS = {"kernelmux.backends", "kernelmux.architectures"}

POLICY = """
[[rule]]
op = "mul_mat"
m = "1..8"
use = ["torch:int4", "torch:int8"]

[defaults]
use = ["torch", "reference"]
"""

# Runs files one after another in one namespace, under their own names.
RUNNER = """
import pathlib, sys
for path in sys.argv[1:]:
    exec(compile(pathlib.Path(path).read_text("utf-8"), path, "exec"), globals())
"""

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def fenced(document: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of every fenced block in a language."""
    text = document.read_text("utf-8")
    pattern = re.compile(rf"^( *)```{language}\b[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, found.start()) + 1, textwrap.dedent(found[2])) for found in pattern.finditer(text)]


@pytest.mark.model
@documents
def test_the_python_of_a_document_runs(document: Path, smollm2: Path, tmp_path: Path):
    (tmp_path / "model.gguf").symlink_to(smollm2)
    (tmp_path / "policy.toml").write_text(POLICY)
    paths = []
    for line, code in fenced(document, "python"):
        paths.append(tmp_path / f"{document.stem}_line_{line}.py")
        # Lines are counted as in the document, for tracebacks.
        paths[-1].write_text("\n" * line + code, "utf-8")
    if not paths:
        assert document != README, "README.md shows no Python"
        return
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER, *paths],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr


@documents
def test_the_toml_of_a_document_is_a_policy_or_registers_a_package(document: Path):
    for line, text in fenced(document, "toml"):
        source = f"{document.name}:{line}"
        project = tomllib.loads(text).get("project")
        if project is None:
            assert parse_policy(text, source).document, source
        else:
            assert {*GROUPS, ENTRY_POINTS} & set(project.get("entry-points", GROUPS)), source


@pytest.mark.model
def test_the_readme_shows_how_to_load_plan_and_generate():
    shown = "\n".join(code for _, code in fenced(README, "python"))
    for call in ("kernelmux.load(", ".plan(", ".generate(", ".forward("):
        assert call in shown, f"README.md shows no {call}...)"
