"""A failure that goes away alone is told so, and the command that is printed repeats it."""

import json
import os
import shlex

import pytest

from command import run_command
from kernelmux.conformance import Outcome, alone
from kernelmux.conformance.alone import MOST, told_alone

slow = pytest.mark.slow  # It runs the command, or the suite, in processes of their own.

BACKEND = """
import torch
from kernelmux.contract import Kernel, hookimpl
from kernelmux.graph.formats import as_tuple

CONTRACT = 2
seen = []  # Of all kernels: what state of a module's own comes to.

class Wears(Kernel):
    ops, name, precision = ("silu",), "wears", 1e-9

    def bind(self, node, tensors, stream):
        seen.append(node.outputs[0].extents)
        (x,), (y,) = tensors.inputs, tensors.outputs
        return lambda: torch.mul(x, torch.sigmoid(x), out=y).add_(1 if WRONG else 0)

@hookimpl
def kernel_classes():
    return [Wears]
"""
AFTER_OTHERS = "seen[0] != (5, 4099) and (1, 576) in seen and y.shape == (5, 576)"
ALONE = "y.shape == (5, 576)"


@pytest.fixture
def installed(tmp_path):
    """Installs a backend whose results are off by 1 where an expression says so; the environment that finds it."""

    def install(wrong):
        info = tmp_path / "kernelmux_worn-0.1.dist-info"
        info.mkdir()
        (tmp_path / "kernelmux_worn.py").write_text(BACKEND.replace("WRONG", wrong))
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernelmux-worn\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text("[kernelmux.backends]\nworn = kernelmux_worn\n")
        paths = filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])
        return {"PYTHONPATH": os.pathsep.join(paths), "KERNELMUX_BACKENDS": "worn", "HOME": str(tmp_path)}

    return install


@slow
def test_what_fails_only_after_other_cases_is_told_so_and_its_command_repeats_it(installed):
    env = installed(AFTER_OTHERS)
    found = run_command("check", "--backend", "worn", "--case", "silu-m[15]-n576", env=env)
    assert found.code == 1
    lines = found.out.splitlines()
    at = lines.index("fail: worn:wears silu-m5-n576")
    assert lines[at + 1] == "  repeatable: it fails only after other cases"
    command = lines[-1 + next(i for i in range(at, len(lines)) if not lines[i])].strip().removeprefix("again: ")
    assert command == ("kernelmux check --kernel worn:wears --op silu --case 'silu-m[15]-n576' --until silu-m5-n576")
    again = run_command(*shlex.split(command)[1:], env=env)
    assert again.code == 1
    assert "fail: worn:wears silu-m5-n576" in again.out
    assert f"again: {command}" in again.out
    assert run_command("check", "--kernel", "worn:wears", "--case", "silu-m5-n576", env=env).code == 0


@slow
def test_where_a_kernel_takes_the_process_down_its_line_is_told(installed):
    env = installed("__import__('ctypes').string_at(0)")
    found = run_command("check", "--backend", "worn", "--case", "silu-m5-n576", env=env)
    assert found.code != 0
    assert "Segmentation fault" in found.err
    assert "kernelmux_worn.py" in found.err


@slow
def test_what_fails_alone_is_told_as_it_is(installed):
    found = run_command("check", "--backend", "worn", "--case", "silu-m[15]-n576", env=installed(ALONE))
    assert found.code == 1
    assert "only after" not in found.out
    assert "again: kernelmux check --kernel worn:wears --case silu-m5-n576" in found.out


@slow
def test_a_random_case_that_fails_only_after_others_is_told_as_it_was_drawn(installed, tmp_path):
    env = installed("len(seen) > 100")
    place = tmp_path / "random.json"
    found = run_command("check", "--fuzz", 60, "--fuzz-cases", place, "--json", env=env)
    (failed,) = (one for one in json.loads(found.out)["outcomes"] if one["status"] == "fail")
    assert failed["failures"][0] == "repeatable: it fails only after other cases"
    assert failed["as_drawn"] is None
    assert failed["alike"]
    words = shlex.split(failed["command"])[1:]
    assert words == [
        *("check", "--kernel", "worn:wears", "--op", "silu", "--fuzz", "60", "--seed", "0", "--until", failed["case"])
    ]
    again = run_command(*words, env=env)
    assert again.code == 1
    assert f"fail: worn:wears {failed['case']}" in again.out
    assert f"again: {failed['command']}" in again.out
    assert run_command("check", "--kernel", "worn:wears", "--cases", place, env=env).code == 0


@slow
def test_the_cases_before_are_those_that_ran_and_of_no_other_kernel(installed):
    """Wrong after the smoke cases before it, and not after all of them."""
    env = installed("(1, 2049) in seen and (3, 2049) not in seen and y.shape == (5, 576)")
    smoke = run_command("check", "--backend", "worn", "--smoke", "--json", env=env)
    failed = [one for one in json.loads(smoke.out)["outcomes"] if one["status"] == "fail"]
    for one in failed:
        words = shlex.split(one["command"])[1:]
        assert words[:5] == ["check", "--kernel", "worn:wears", "--op", "silu"]
        assert "--smoke" in words
        assert run_command(*words, env=env).code == 1
    assert failed


def failures(count, kernel="worn:wears"):
    return [
        Outcome(f"silu-m{m}-n576", "silu", kernel, "", "fail", failures=("error: too large",)) for m in range(count)
    ]


@pytest.fixture
def asked(monkeypatch):
    """The cases that are run again, of a backend that is installed; those of odd rows fail alone, others after some."""
    cases = []

    def fails(outcome, seconds):
        cases.append(outcome.case)
        return outcome.before == "kernel" or "m1-" in outcome.case or "m3-" in outcome.case

    monkeypatch.setattr(alone, "_fails", fails)
    monkeypatch.setattr(alone, "_installed", lambda backend: True)
    return cases


def test_where_many_go_away_alone_the_rest_are_told_without_running_again(asked):
    counted = []
    found, interrupted = told_alone(failures(4 + 2 * MOST), counted.append)
    assert not interrupted
    assert len(set(asked)) == MOST + 2
    assert counted == ["worn:wears silu"] * len(found)
    assert [one.before for one in found] == ["kernel", "", "kernel", "", *["kernel"] * (2 * MOST)]
    assert found[1] == failures(2)[1]
    told = {one.failures[0] for one in found[MOST + 2 :]}
    assert told == {f"repeatable: it was not run again: {MOST} of this kernel before it pass alone"}


def test_where_it_took_too_long_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(alone, "_installed", lambda backend: True)
    monkeypatch.setattr(alone, "_fails", lambda outcome, seconds: None if outcome.before else False)
    (found,), _ = told_alone(failures(1), str)
    assert found.failures[0].endswith("alone; what it takes to repeat it is not known")
