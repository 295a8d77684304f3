"""`kernelmux tune` from the command line: whatever kernels do, a policy is written that makes a plan of this machine.
"""

from __future__ import annotations

import os

import pytest

import unruly
from command import run_command
from kernelmux.contract.device import find_device
from kernelmux.policy.policy import read_policy
from kernelmux.run.model import load_random

TINY = ("--random", "tiny:Q4_1", "--m", "1,8", "--context", "16")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run beside a backend of which kernels crash, hang and corrupt, and one that goes on where it ended."""
    folder = unruly.install(tmp_path_factory.mktemp("path"))
    policy = folder / "policy.toml"
    env = {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "KERNELMUX_CACHE": str(tmp_path_factory.mktemp("cache")),
        "KERNELMUX_BACKENDS": "unruly,torch,reference",
    }
    first = run_command("tune", *TINY, "--budget", "1200s", "-o", policy, env=env)
    again = run_command("tune", *TINY, "--budget", "1200s", env=env)
    planned = run_command("plan", "--random", "tiny:Q4_1", env=env)
    return first, again, planned, policy


def test_what_crashes_hangs_or_corrupts_is_noted_and_the_file_is_written(tuned):
    first, _, _, policy = tuned
    assert first.code == 0, first.err
    assert "silu unruly:crashes is left out: its smoke cases: its process crashed: SIGSEGV" in first.err
    assert "silu unruly:hangs is left out: its smoke cases: it hung" in first.err
    assert "silu unruly:corrupts is left out: smoke case " in first.err
    text = policy.read_text("utf-8")
    assert "# silu unruly:crashes: its smoke cases: its process crashed: SIGSEGV" in text
    assert f'tuned_for = "{find_device().device_class}"' in text


def test_the_policy_makes_a_plan_in_which_none_of_them_is(tuned):
    *_, policy = tuned
    text = policy.read_text("utf-8")
    rules = text[text.index("[[rule]]") :]
    assert not any(f'use = "unruly:{name}' in rules for name in ("crashes", "hangs", "corrupts"))
    plan = load_random("tiny:Q4_1").plan(read_policy(policy)) if "unruly:good" not in rules else None
    assert plan is None or plan.notes == ()


def test_the_comparison_and_the_divergence_are_told_on_the_screen_and_in_the_file(tuned):
    first, _, _, policy = tuned
    text = policy.read_text("utf-8")
    for told in (first.out, text):
        assert "tokens/s" in told
        assert "auto before" in told
        assert "KL of decoding" in told
        assert "float32" in told


def test_a_second_run_asks_nothing_again_and_knows_what_failed(tuned):
    _, again, _, _ = tuned
    assert again.code == 0, again.err
    assert "0 kernels were timed" in again.out
    assert "silu unruly:crashes is left out: its smoke cases failed here on " in again.err


def test_the_default_choice_is_by_what_was_measured_from_then_on(tuned):
    _, _, planned, _ = tuned
    assert "measured here" in planned.out or "100% of it measured" in planned.out or "measured" in planned.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", "soon"), "'soon' is no time: write 90s, 5m or 1h"),
        (("--budget", "0"), "'0' is no time"),
        (("--m", "1,x"), "--m 1,x: row counts from 1"),
        (("--m", "0"), "--m 0: row counts from 1"),
        (("--max-error", "-1"), "an error budget is above 0, not -1"),
        (("-o", "nowhere/p.toml"), "there is no folder nowhere"),
        (("--context", "1000000"), "tokens of a sequence were asked for, the model holds"),
        (("--device", "cuda:9"), "device 'cuda:9' was asked for"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(options, said):
    result = run_command("tune", "--random", "tiny:Q4_1", *options)
    assert result.code == 2
    assert said in " ".join(result.err.replace("│", " ").split())
