"""What examples/ shows works: the script, and the tutorial backend, installed with pip; the pages quote it as it is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernelmux
from command import TIMEOUT, clean_environment
from kernelmux.conformance import run_case
from kernelmux.contract import CONTRACT, hookimpl, registry
from kernelmux.graph.ops import OPS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TUTORIAL = EXAMPLES / "tutorial-backend"
GOLDEN = json.loads((ROOT / "tests" / "data" / "smollm2_greedy.json").read_text("utf-8"))["cases"][0]
TOKENS = 4
QUOTE = re.compile(r"^`([\w./]+)`:\n\n```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = ("-c", "from kernelmux.cli import main; main()")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python in a copy of the tutorial's folder, where it is installed beside what is installed here."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("the tutorial is installed with pip, which this environment lacks")
    home = tmp_path_factory.mktemp("tutorial")
    # A copy: a build leaves files behind, and pytest would find this repository's settings.
    folder = shutil.copytree(TUTORIAL, home / "kernelmux-tutorial", ignore=shutil.ignore_patterns("__pycache__"))
    path = os.pathsep.join([str(home / "installed"), *filter(None, sys.path)])
    env = clean_environment({"PYTHONPATH": path, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"})

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", *map(str, arguments)]
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )

    target = ("--no-deps", "--no-build-isolation", "--target", home / "installed")
    # Pip's own warnings are not ours to mend.
    installed = run("-W", "default", "-m", "pip", "install", "--quiet", *target, ".")
    assert installed.returncode == 0, installed.stderr
    return run


def test_the_shortest_script_answers(tiny: Path):
    command = [sys.executable, "-W", "error", EXAMPLES / "answer.py", tiny, "hello"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, check=False, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "".join(kernelmux.load(tiny).generate("hello", max_tokens=32)) + "\n"


@pytest.mark.slow
def test_the_tutorials_own_tests_pass(tutorial: Run):
    """One line in its test file; a failure of any kernel, and a warning, would fail it."""
    done = tutorial("-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) > 200


def test_the_tutorial_is_listed_with_its_ops(tutorial: Run):
    document = json.loads(tutorial(*COMMAND, "backends", "--json").stdout)
    (row,) = (row for row in document["backends"] if row["name"] == "tutorial")
    assert (row["version"], row["fault"]) == ("0.1.0", "")
    assert set(row["ops"]) == {"mul_mat", "rms_norm", "add", "silu"}


@pytest.mark.slow
@pytest.mark.model
def test_its_policy_runs_it_in_a_real_model(tutorial: Run, smollm2: Path):
    asked = ("-p", GOLDEN["prompt"], "--max-tokens", TOKENS, "--policy", "policy.toml", "--capture-cases", "model.json")
    ran = tutorial(*COMMAND, "run", smollm2, *asked, "--json")
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["ids"] == GOLDEN["greedy"][:TOKENS]
    kernels = {op: set(counts) for op, counts in document["kernels"].items()}
    assert kernels["mul_mat"] > {"tutorial:int4"}, "all but the logits' Q8_0"
    assert all(kernels[op] == {"tutorial:f32"} for op in ("rms_norm", "add", "silu"))

    checked = tutorial(*COMMAND, "check", "--backend", "tutorial", "--cases", "model.json")
    assert checked.returncode == 0, checked.stdout
    assert " 0 fail" in checked.stdout


def test_the_tutorial_can_be_read_in_one_sitting():
    lines = [line for path in (TUTORIAL / "kernelmux_tutorial").glob("*.py") for line in path.read_text().splitlines()]
    assert len(lines) <= 125


@pytest.mark.parametrize("page", [TUTORIAL / "README.md", ROOT / "docs" / "writing-a-backend.md"], ids=lambda p: p.name)
def test_a_page_quotes_the_tutorial_as_it_is(page: Path):
    quotes = QUOTE.findall(page.read_text("utf-8"))
    assert len(quotes) >= 4
    for name, text in quotes:
        assert text in (TUTORIAL / name).read_text("utf-8"), f"{page.name} quotes {name} otherwise than it is"


def test_the_pages_kernel_with_variants_is_right():
    page = (ROOT / "docs" / "writing-a-backend.md").read_text("utf-8")
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def variants" in block)
    space = {"torch": torch}
    exec(source, space)
    kernel = space["BlockedSilu"]
    plugin = SimpleNamespace(CONTRACT=CONTRACT, kernel_classes=hookimpl(lambda: [kernel]))
    with registry.isolated(mine=plugin) as found:
        for case in OPS["silu"].cases():
            if "smoke" in case.marks:
                assert run_case(case, "mine:blocked", found).failures == (), case.name
