"""`kernelmux backends`: what is installed, what is broken, and what to install where there is nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from command import assert_one_line_error, call_command, run_command
from kernelmux.conformance.testing import one_node
from kernelmux.contract import CONTRACT, Device, Kernel, hookimpl, registry
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import OPS

BROKEN = SimpleNamespace(CONTRACT=99)


def test_every_installed_backend_is_listed_with_its_version_and_ops():
    lines = [line.split("\t") for line in call_command("backends").out.splitlines()]
    assert lines[0] == ["backend", "version", "ops"]
    listed = {name: (version, ops.split()) for name, version, ops in lines[1:]}
    assert {"reference", "torch"} <= set(listed)
    assert set(listed["reference"][1]) <= set(OPS)
    assert "mul_mat" in listed["torch"][1]
    assert listed["torch"][0] == registry.current().backends["torch"].version


def test_json_says_the_same_to_a_script():
    result = call_command("backends", "--json")
    rows = {row["name"]: row for row in json.loads(result.out)["backends"]}
    assert {"reference", "torch"} <= set(rows)
    assert "attention" in rows["reference"]["ops"]
    assert rows["torch"]["fault"] == ""


def test_a_broken_backend_is_listed_as_quarantined_with_its_fault():
    with registry.isolated(broken=BROKEN):
        plain, verbose = call_command("backends"), call_command("backends", "--verbose")
        rows = json.loads(call_command("backends", "--json").out)["backends"]
    assert (plain.code, verbose.code) == (0, 0)
    assert "broken" in plain.out
    assert "quarantined: BackendError: the backend was built for contract 99" in plain.out
    assert "Traceback" not in plain.out
    assert "Traceback" in verbose.out
    assert rows[0]["fault"].startswith("BackendError: the backend was built for contract 99")


def test_a_backend_that_breaks_when_it_is_asked_shows_no_kernels(monkeypatch):
    def refuses(self, node):
        return "words"

    odd = type("Odd", (Kernel,), {"ops": ("add",), "name": "odd", "precision": 0, "refuses": refuses, "bind": None})
    listed = SimpleNamespace(CONTRACT=CONTRACT, kernel_classes=hookimpl(lambda: [odd]))
    with registry.isolated(odd=listed) as found:
        assert "odd:odd of add" in call_command("backends", "--verbose").out
        found.offer(one_node("add", Value("a", (1, 8)), Value("b", (1, 8))), Device("cpu"))
        shown = call_command("backends", "--verbose").out
        (row,) = json.loads(call_command("backends", "--verbose", "--json").out)["backends"]
    assert "quarantined: BackendError: odd:odd.refuses returned 'words' (str)" in shown
    assert "odd:odd of add" not in shown
    assert (row["ops"], row["kernels"]) == ([], [])


def test_without_any_backend_both_list_and_run_say_what_to_install(tiny: Path):
    with registry.isolated():
        listed = call_command("backends")
        ran = call_command("run", tiny, "-p", "hello")
    assert "pip install kernelmux-torch" in listed.out
    assert_one_line_error(ran, "no backend is installed", "pip install kernelmux-torch")


def test_with_only_broken_backends_a_run_names_their_faults(tiny: Path):
    with registry.isolated(broken=BROKEN):
        result = call_command("run", tiny, "-p", "hello")
    assert_one_line_error(result, "broken: BackendError: the backend was built for contract 99")


def test_the_environment_may_narrow_the_backends_down():
    result = run_command("backends", "--json", env={"KERNELMUX_BACKENDS": "reference"})
    assert [row["name"] for row in json.loads(result.out)["backends"]] == ["reference"]


def test_a_typo_in_the_environment_names_the_nearest_backend():
    result = run_command("backends", env={"KERNELMUX_BACKENDS": "troch"})
    assert_one_line_error(result, "KERNELMUX_BACKENDS", "'troch'", "did you mean 'torch'?")


def test_verbose_lists_every_kernel_with_what_it_takes():
    plain, verbose = (call_command("backends", *more, "--json") for more in ([], ["--verbose"]))
    assert "kernels" not in json.loads(plain.out)["backends"][0]
    kernels = {
        f"{row['name']}:{kernel['name']}": kernel
        for row in json.loads(verbose.out)["backends"]
        for kernel in row["kernels"]
    }
    assert kernels["reference:f64"]["ops"] == ["*"]
    assert kernels["reference:f64"]["precision"] == 1e-20
    assert kernels["torch:int4"]["takes"]["weight_format"] == "Q4_0 and Q4_1"
    assert "torch:int4 of mul_mat: NMSE up to 5e-05; " in call_command("backends", "--verbose").out
