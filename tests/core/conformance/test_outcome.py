"""What came of a case: the command that runs it again."""

import shlex

import pytest

from kernelmux.conformance import Outcome
from kernelmux.conformance.outcome import Run


def test_the_command_names_device_and_peer_where_they_were_not_the_usual():
    plain = Outcome("mul-a", "mul", "x:f32", "", "fail")
    assert plain.command == "kernelmux check --kernel x:f32 --case mul-a"
    other = Outcome("mul-[a]", "mul", "x:f32", "", "fail", device="cuda:1", peer="torch:f32")
    assert shlex.split(other.command)[4:] == ["--case", "mul-[a]", "--device", "cuda:1", "--peer", "torch:f32"]


def test_the_command_runs_others_before_it_where_it_fails_only_then():
    def command(before):
        outcome = Outcome("mul-a@all=f16", "mul", "x:f32", "", "fail", device="cuda", before=before)
        return outcome.command.removeprefix("kernelmux check ")

    assert command("op") == "--kernel x:f32 --op mul --until mul-a@all=f16 --device cuda"
    assert command("kernel") == "--kernel x:f32 --until mul-a@all=f16 --device cuda"
    assert command("backend") == "--backend x --until mul-a@all=f16 --device cuda"


@pytest.mark.parametrize(
    ("run", "befores", "all_that_ran"),
    [
        (Run(), ["op", "kernel", "backend", "run"], ""),
        (Run(backend="x", smoke=True), ["op", "kernel", "backend", "run"], "--backend x --smoke"),
        (Run(kernel="x:f32", shard="1/2"), ["op", "kernel", "run"], "--kernel x:f32 --shard 1/2"),
        (Run(ops=("mul", "add"), case="m*"), ["op", "run"], "--op mul --op add --case 'm*'"),
        (Run(ops=("mul",), fuzz=9, seed=2), ["op", "run"], "--op mul --fuzz 9 --seed 2"),
    ],
)
def test_nothing_runs_before_it_that_did_not_run(run, befores, all_that_ran):
    assert list(run.befores) == befores
    outcome = Outcome("mul-a", "mul", "x:f32", "", "fail", run=run, before="run")
    assert outcome.command == " ".join(f"kernelmux check {all_that_ran} --until mul-a".split())
