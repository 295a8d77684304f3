"""`--exact` of `plan`, `run` and `bench model`: the policy `exact`, and no other beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kernelmux
from command import call_command
from kernelmux.policy.policy import EXACT

COMMANDS = {
    "plan": lambda model: ("plan", model),
    "run": lambda model: ("run", model, "-p", "hello", "--max-tokens", 2),
    "bench model": lambda model: ("bench", "model", model, "--prompt", 4, "--context", 4, "--decode", 2),
}
commands = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


@commands
def test_it_is_an_option_of_the_command(tiny: Path, command):
    done = call_command(*command(tiny), "--exact")
    assert done.code == 0, done.err
    assert "kernelmux: " not in done.err


@commands
@pytest.mark.parametrize("policy", ["default", "exact", "p.toml"])
def test_another_policy_beside_it_is_refused_with_how_to_have_both(tiny: Path, tmp_path: Path, command, policy: str):
    (tmp_path / "p.toml").write_text("fuse = false\n")
    asked = tmp_path / policy if policy.endswith(".toml") else policy
    done = call_command(*command(tiny), "--exact", "--policy", asked)
    assert done.code == 2
    assert "extends" in done.err
    assert "--policy" in done.err


def test_it_has_no_use_for_a_locked_plan_or_for_two_policies(tiny: Path, tmp_path: Path):
    lock = tmp_path / "lock.json"
    assert call_command("plan", tiny, "--exact", "--lock", lock).code == 0
    assert call_command("run", tiny, "-p", "hello", "--exact", "--plan", lock).code == 2
    assert call_command("plan", tiny, "--exact", "--diff", "default", "exact").code == 2


def plan(*arguments):
    return json.loads(call_command("plan", *arguments, "--json").out)


def test_it_is_the_policy_of_that_name_in_python_too(tiny: Path):
    asked = plan(tiny, "--exact")
    assert asked["policy"] == "exact.toml"
    assert asked["fingerprint"] == plan(tiny, "--policy", "exact")["fingerprint"]
    assert asked["fingerprint"] == kernelmux.load(tiny).plan(EXACT).fingerprint


def test_a_file_of_that_name_does_not_take_its_place(tiny: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("exact").write_text('[defaults]\nuse = "reference"\n')
    assert plan(tiny, "--exact")["policy"] == "exact.toml"
    assert plan(tiny, "--policy", "exact")["policy"] == "exact"


def test_use_outranks_it_within_its_budget(without_numba: None, tiny: Path):
    def products(use):
        nodes = plan(tiny, "--exact", "--use", f"mul_mat={use}")["nodes"]
        return {node["kernel"] for node in nodes if node["op"] == "mul_mat"}

    assert products("reference:f64") == {"reference:f64"}
    assert products("torch:bf16") == {"torch:f32"}
    told = call_command("plan", tiny, "--exact", "--use", "mul_mat=torch:bf16").err
    assert "its error bound 5e-05 is over the budget 1e-09" in told


def test_it_can_be_compared_with_the_default_and_checked(tiny: Path):
    assert call_command("plan", tiny, "--diff", "exact", "exact").code == 0
    assert call_command("policy", "check", "exact").out == "exact: no findings\n"
