"""`kernelmux tune` from the command line: whatever kernels do, a policy is written that makes a plan."""

from __future__ import annotations

import json
import os

import pytest

import unruly
from command import run_command
from kernelmux.contract.device import find_device

TINY = ("--random", "tiny:Q4_1", "--m", "1,8", "--context", "16")


@pytest.mark.slow
def test_beside_kernels_that_crash_hang_and_corrupt_a_policy_is_written_and_the_table_kept(tmp_path):
    """One story in one test: each run of it costs many processes."""
    (tmp_path / "path").mkdir()
    policy = tmp_path / "policy.toml"
    env = {
        "PYTHONPATH": os.pathsep.join([str(unruly.install(tmp_path / "path")), os.environ.get("PYTHONPATH", "")]),
        "KERNELMUX_CACHE": str(tmp_path / "cache"),
        "KERNELMUX_BACKENDS": "unruly,torch,reference",
    }
    first = run_command("tune", *TINY, "--budget", "1200s", "-o", policy, env=env)
    assert first.code == 0, first.err
    assert "silu unruly:crashes is left out: its smoke cases: its process crashed: SIGSEGV" in first.err
    assert "silu unruly:hangs is left out: its smoke cases: it hung" in first.err
    assert "silu unruly:corrupts is left out: smoke case " in first.err
    text = policy.read_text("utf-8")
    assert "# silu unruly:crashes: its smoke cases: its process crashed: SIGSEGV" in text
    assert f'tuned_for = "{find_device().device_class}"' in text
    rules = text[text.index("[[rule]]") :]
    assert not any(f'use = "unruly:{name}' in rules for name in ("crashes", "hangs", "corrupts"))
    for told in (first.out, text):
        for word in ("okens/s of whole steps", "auto before", "KL of decoding", "float32"):
            assert word in told
    # With none of the three installed the file makes a plan all the same: it names none of them.
    planned = run_command("plan", "--random", "tiny:Q4_1", "--policy", policy, "--json", env=env)
    assert planned.code == 0, planned.err

    again = run_command("tune", *TINY, "--budget", "1200s", "--json", env=env)
    assert again.code == 0, again.err
    told = json.loads(again.out)
    assert told["faults"].keys() >= {f"silu unruly:{name}" for name in ("crashes", "hangs", "corrupts")}
    assert told["compared"][0]["times"].keys() == told["winners"].keys() == {"1", "8"}
    assert "silu unruly:crashes is left out: its smoke cases failed here on " in again.err
    # What hung is not waited for again.
    assert "its smoke cases: it hung" not in again.err
    why = run_command("plan", "--random", "tiny:Q4_1", "--why", "blk.0.ffn_down", env=env)
    assert "measured here" in why.out
    assert "its smoke cases failed here" in run_command("plan", *TINY[:2], "--why", "blk.0.ffn_silu", env=env).out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", "soon"), "'soon' is no time: write 90s, 5m or 1h"),
        (("--budget", "0"), "'0' is no time"),
        (("--m", "1,x"), "--m 1,x: row counts from 1"),
        (("--m", "0"), "--m 0: row counts from 1"),
        (("--max-error", "-1"), "an error budget is above 0, not -1"),
        (("-o", "nowhere/p.toml"), "there is no folder nowhere"),
        (("--context", "1000000"), "a context of 1000000 tokens was asked for, the model holds 2048"),
        (("--device", "cuda:9"), "device 'cuda:9' was asked for"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(options, said):
    result = run_command("tune", "--random", "tiny:Q4_1", *options)
    assert result.code == 2
    assert said in result.err
