"""Options: each counts, none means two things, and what messages advise exists."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import kernelmux
from command import TIMEOUT, assert_one_line_error, call_command, clean_environment
from kernelmux.cli import app

CORE = Path(kernelmux.__file__).parent


def commands(group: object, words: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


ALL = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["run", "m.gguf", "-p", "a", "--prompt", "b"], "--prompt"),
        (["plan", "m.gguf", "--policy", "a.toml", "--policy", "b.toml"], "--policy"),
        (["plan", "m.gguf", "--device=cpu", "--device", "cpu"], "--device"),
        (["check", "--kernel", "torch:f32", "--kernel", "torch:bf16"], "--kernel"),
        (["bench", "ops", "--m", "1", "--m", "2"], "--m"),
        (["policy", "check", "p.toml", "--model", "a", "--model", "b"], "--model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_option_that_takes_one_value_is_refused_where_it_is_given_twice(arguments: list[str], option: str):
    assert_one_line_error(call_command(*arguments), f"{option} is given 2 times")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["check", "--backend", ""], "--backend"),
        (["check", "--op", "silu", "--op="], "--op"),
        (["check", "--until="], "--until"),
        (["plan", "m.gguf", "--use="], "--use"),
        (["chat", "m.gguf", "--system="], "--system"),
    ],
    ids=str,
)
def test_an_option_that_is_empty_is_refused_where_that_is_as_if_it_were_not_given(arguments: list[str], option: str):
    assert_one_line_error(call_command(*arguments), f"{option} is empty: give it a value, or leave it out")


def test_a_switch_may_be_given_twice(tiny: Path):
    assert call_command("graph", tiny, "--json", "--json").code == 0


def test_check_takes_every_op_that_is_named():
    lines = call_command("check", "--smoke", "--list", "--op", "rms_norm", "--op", "add").out.splitlines()
    assert {line.split("\t")[0] for line in lines} == {"rms_norm", "add"}
    document = json.loads(call_command("check", "--smoke", "--list", "--op", "add", "--json").out)
    assert {case["op"] for case in document["cases"]} == {"add"}
    assert_one_line_error(call_command("check", "--list", "--op", "add", "--op", "ad"), "unknown op 'ad'")


def test_json_is_the_same_switch_of_every_command_that_has_it():
    found = {
        name: param
        for name, command in ALL.items()
        for param in command.params  # type: ignore[attr-defined]
        if "--json" in param.opts
    }
    assert {
        "run",
        "info",
        "quantize",
        "trace",
        "plan",
        "compare",
        "bisect",
        "graph",
        "backends",
        "check",
        "tune",
        "bench ops",
        "bench model",
        "policy check",
    } == {*found}
    assert all(param.is_flag for param in found.values())


def test_json_of_bench_and_check_is_alone_on_stdout(tiny: Path, tmp_path: Path):
    saved = tmp_path / "saved.json"
    asked = ("bench", "ops", "--shape", "64x64:f32", "--kernel", "torch:f32", "--json", "--save", saved)
    printed = json.loads(call_command(*asked).out)
    assert printed == json.loads(saved.read_text())
    assert printed["rows"]
    case = ("check", "--backend", "reference", "--op", "add", "--smoke", "--json")
    assert json.loads(call_command(*case).out)["outcomes"]


def texts() -> Iterator[tuple[str, str]]:
    """Every string of core's that a person may read, docstrings left out, with its file."""
    for file in sorted(CORE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield str(file.relative_to(CORE)), node.value


FOREIGN = {"--gpu-architecture", "--merge", "--short"}
"""Options of other programs."""


def test_messages_advise_options_and_commands_that_exist():
    options = {option for command in ALL.values() for param in command.params for option in param.opts}  # type: ignore[attr-defined]
    options |= {"--version", "--help"}
    pytests = set(re.findall(r"--kernelmux-[a-z-]+", (CORE / "conformance/plugin.py").read_text()))
    for file, text in texts():
        if file.startswith("cli/stages"):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text):
            assert option in options | pytests | FOREIGN, (file, text)
        for name in re.findall(r"(?<![\w./-])kernelmux (bench \w+|policy \w+|[a-z]+)(?= --| MODEL| FILE|`|$)", text):
            # The name of a section of pytest's report is no command's.
            assert name in {*ALL, "conformance"}, (file, text)


def prompted(data: bytes, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "kernelmux", "run", *map(str, arguments), "-p", "-", "--max-tokens", "1", "--json"]
    return subprocess.run(
        command, input=data, capture_output=True, timeout=TIMEOUT, env=clean_environment(), check=False
    )


@pytest.mark.parametrize(("data", "text"), [(b"h\n", "h"), (b"a\n\nb", "a\n\nb"), ("é€\r\n".encode(), "é€")])
def test_a_prompt_comes_from_stdin(tiny: Path, data: bytes, text: str):
    ran = prompted(data, tiny)
    assert kernelmux.load(tiny).source.tokenizer.decode(json.loads(ran.stdout)["prompt_ids"]) == text


def test_a_prompt_from_stdin_that_is_no_text_is_one_line(tiny: Path):
    ran = prompted(b"ab\xff", tiny)
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr.decode().splitlines()[-1] == "kernelmux: ModelError: stdin: not UTF-8 text (byte 0xff at 2)"


@pytest.mark.parametrize(("tokens", "answer"), [(200, 57), (255, 2), (256, 1)])
def test_a_prompt_that_fits_is_answered_with_as_many_tokens_as_there_is_room_for(tiny: Path, tokens: int, answer: int):
    model = kernelmux.load(tiny)
    assert model.generate([5] * tokens).max_tokens == answer
    result = call_command("run", tiny, "-p", "x" * tokens, "--json")
    assert len(json.loads(result.out)["ids"]) in range(1, answer + 1)


def test_a_prompt_beside_which_the_tokens_asked_for_do_not_fit_says_how_many_would(tiny: Path):
    result = call_command("run", tiny, "-p", "x" * 200, "--max-tokens", 58)
    assert_one_line_error(result, "200 tokens", "256", "ask for up to 57 (--max-tokens)")
    assert call_command("run", tiny, "-p", "x" * 200, "--max-tokens", 57).code == 0


@pytest.mark.slow
def test_policies_and_plans_come_from_pipes(tiny: Path, tmp_path: Path):
    (tmp_path / "p.toml").write_text("fuse = false\n")
    lock = tmp_path / "l.lock"
    assert call_command("plan", tiny, "--lock", lock).code == 0
    script = (
        'set -e; cd "$1"; R="$2 -m kernelmux"; M="$3"\n'
        "$R plan $M --policy <(cat p.toml) --json | grep -c fingerprint\n"
        "$R plan $M --diff <(cat l.lock) <(cat p.toml)\n"
        "$R plan $M --diff <(cat p.toml) l.lock --json | grep -c moves\n"
        "$R run $M -p hi --max-tokens 1 --plan <(cat l.lock) --json | grep -c fingerprint\n"
        "$R policy check <(cat p.toml) | grep -c 'no findings'\n"
    )
    words = ["bash", "-c", script, "bash", str(tmp_path), sys.executable, str(tiny)]
    ran = subprocess.run(words, capture_output=True, timeout=TIMEOUT, env=clean_environment(), check=False, text=True)
    assert ran.returncode == 0, ran.stderr
