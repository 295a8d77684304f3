"""What came of a case: the command that runs it again."""

import shlex

from kernelmux.conformance import Outcome


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
