"""The pytest plugin: nothing where no suite runs; where one does, the cases asked for, files, and a line of counts."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from command import TIMEOUT

pytestmark = pytest.mark.slow

PLUGIN = "kernelmux.conformance.plugin"
LOADS_NOTHING = f"""
import sys

def test_neither_torch_nor_the_suite_is_loaded(request):
    assert request.config.pluginmanager.has_plugin("kernelmux-results")
    ours = {{name for name in sys.modules if name.startswith("kernelmux")}}
    assert ours == {{"kernelmux", "kernelmux.conformance", "{PLUGIN}"}}
    assert "torch" not in sys.modules
"""
SUITE = """
import pytest

import kernelmux.conformance
from fake_backend import FakeKernel, compute
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract import Declined

def work(node, tensors):
    compute(node, tensors)
    if node.outputs[0].extents[0] == 5:
        tensors.outputs[0].add_(1)

def answer(node, m):
    return Declined("eight rows are too many", kernel="f32") if m == 8 else FakeKernel(emits=["f32", "f16"], work=work)

registry.register(backend(silu=answer), "tiny")
TestTiny = kernelmux.conformance.suite("tiny")

def test_of_something_else():
    pass
"""


def run_pytest(folder: Path, test: str, *arguments: str):
    """pytest on one file, no plugin but ours; its exit code, and its output's lines."""
    (folder / "test_it.py").write_text(test)
    paths = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", PLUGIN, *arguments],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return ran.returncode, (ran.stdout + ran.stderr).splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the whole suite on a backend that is wrong for five rows, and refuses eight."""
    folder = tmp_path_factory.mktemp("whole")
    asked = ("--kernelmux-json=out/found.json", "--kernelmux-html=out/found.html", "--junitxml=junit.xml")
    code, lines = run_pytest(folder, SUITE, *asked)
    return folder, code, lines


def test_the_plugin_is_installed():
    assert [entry.value for entry in entry_points(group="pytest11", name="kernelmux")] == [PLUGIN]


def test_where_no_suite_runs_it_loads_nothing_and_says_nothing(tmp_path):
    code, lines = run_pytest(tmp_path, LOADS_NOTHING)
    assert code == 0, "\n".join(lines)
    assert not any("kernelmux" in line for line in lines)


@pytest.mark.slow
def test_a_line_of_counts_ends_the_run_and_the_files_say_the_same(whole):
    folder, code, lines = whole
    totals = json.loads((folder / "out" / "found.json").read_text())["totals"]
    assert code == 1
    assert min(totals["pass"], totals["refused"], totals["fail"]) > 0
    expected = f"{totals['pass']} pass, {totals['refused']} refused, {totals['fail']} fail, 0 known"
    assert f"tiny on cpu: {expected}" in lines
    assert f"{totals['fail']} failed, {totals['pass'] + 2} passed, {totals['refused']} skipped" in lines[-1]
    assert "Conformance of tiny" in (folder / "out" / "found.html").read_text()


def test_a_failure_is_the_suites_message_and_no_line_of_its_code(tmp_path):
    code, lines = run_pytest(tmp_path, SUITE, "--kernelmux-case=silu-m5-n576")
    assert code == 1
    first = next(index for index, line in enumerate(lines) if line.startswith("error: "))
    assert re.search(r"the worst is silu\[\d, \d+\] = \S+, expected \S+ of \[5, 576\]; 100 % of its", lines[first])
    assert re.fullmatch(r"_+ TestTiny\.test_case\[tiny:\S+\] _+", lines[first - 1])
    assert lines[first + 1] == "again: kernelmux check --kernel tiny:f32 --case silu-m5-n576"
    assert not any("hookup.py" in line or line.startswith(">") for line in lines)


@pytest.mark.slow
def test_a_kernel_that_raises_is_named_with_its_line_and_verbosely_with_its_traceback(tmp_path):
    raising = SUITE.replace("tensors.outputs[0].add_(1)", "raise OverflowError('too many rows')")
    for flags, traced in (((), False), (("-vv",), True)):
        code, lines = run_pytest(tmp_path, raising, "--kernelmux-case=silu-m5-n576", *flags)
        assert code == 1
        assert any("raises: OverflowError: too many rows (fake_backend.py:" in line for line in lines)
        assert any(line.endswith(", in work") for line in lines) == traced


def test_junit_carries_each_outcome(whole):
    folder, _, _ = whole
    document = json.loads((folder / "out" / "found.json").read_text())
    found = []
    for test in ElementTree.parse(folder / "junit.xml").iter("testcase"):
        properties = {one.get("name"): one.get("value") for one in test.iter("property")}
        if properties:
            found.append((properties["kernelmux_case"], properties["kernelmux_status"], properties["kernelmux_device"]))
    assert found == [(outcome["case"], outcome["status"], "cpu") for outcome in document["outcomes"]]


@pytest.mark.parametrize("pattern", ["silu-m5-n576", "silu-m5-n576@outputs0=f16"])
def test_a_name_in_full_runs_that_case_alone_and_leaves_other_tests(tmp_path, pattern):
    _, lines = run_pytest(tmp_path, SUITE, f"--kernelmux-case={pattern}", "--kernelmux-json=found.json")
    document = json.loads((tmp_path / "found.json").read_text())
    assert [outcome["case"] for outcome in document["outcomes"]] == [pattern]
    counts = [int(word) for word, what in pairwise(lines[-1].split()) if what.rstrip(",") in ("passed", "failed")]
    assert sum(counts) == 3  # that case, that the backend takes some, and the test of something else


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name(tmp_path):
    code, lines = run_pytest(tmp_path, SUITE, "--kernelmux-case=silu-m5-n57")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "did you mean 'silu-m5-n576'?" in "\n".join(lines)
