"""The command as a whole: help, version, what it imports, usage errors, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import kernelmux
from command import TIMEOUT, assert_one_line_error, call_command, clean_environment, run_command, start_command

COMMANDS = ("run", "plan", "graph", "backends", "check")
OPTIONS = {
    "check": "--backend --op --kernel --case --device --smoke --large --peer --known --list --json --html",
    "run": "--prompt --chat --policy --use --device --max-tokens --temperature --top-p --top-k --seed --json",
    "plan": "--policy --use --device --rows --json",
    "graph": "--dot --json",
    "backends": "--verbose --json",
}
FRAMEWORKS = ("torch", "cupy", "triton", "numba")
BACKEND_MODULES = sorted({entry.module for entry in entry_points(group="kernelmux.backends")})


def test_help_names_every_command():
    result = run_command("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)
    assert "\x1b" not in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_options_and_says_what_it_does(command: str):
    result = run_command(command, "--help")
    assert result.code == 0
    assert result.err == ""
    for option in OPTIONS[command].split():
        assert option in result.out


def test_no_command_shows_the_help():
    result = run_command()
    assert all(command in result.out + result.err for command in COMMANDS)


def test_version_is_the_packages():
    assert run_command("--version").out == f"kernelmux {kernelmux.__version__}\n"


@pytest.mark.parametrize(
    "statement",
    [
        *("import kernelmux", "from kernelmux import KernelmuxError", "import kernelmux.cli"),
        *(f"import {module}" for module in BACKEND_MODULES),
    ],
)
def test_an_import_loads_no_framework(statement: str):
    assert _frameworks_after(statement) == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["policy", "schema"]], ids=" ".join)
def test_a_command_that_computes_nothing_loads_no_framework(arguments: list[str]):
    code = f"import sys; sys.argv = ['kernelmux', *{arguments}]\nfrom kernelmux.cli import main\n"
    assert _frameworks_after(code + "try: main()\nexcept SystemExit: pass") == []


def _frameworks_after(statements: str) -> list[str]:
    """Which frameworks a fresh Python has loaded after some statements."""
    report = f"\nimport sys; print(*(name for name in {FRAMEWORKS} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", statements + report], capture_output=True, text=True, check=True, env=clean_environment()
    )
    return done.stderr.split()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["nope"], "No such command 'nope'; commands: run, chat, "),
        (["policy", "nope"], "commands: check, schema;"),
        (["run", "model.gguf"], "--prompt"),
        (["run", "model.gguf", "-p"], "-p"),
        (["run", "model.gguf", "-p", "hi", "--temperature", "-1"], "--temperature"),
        (["run", "model.gguf", "-p", "hi", "--temperature", "warm"], "--temperature"),
        (["run", "model.gguf", "-p", "hi", "--top-k", "-1"], "--top-k"),
        (["run", "model.gguf", "-p", "hi", "--max-tokens", "0"], "--max-tokens"),
        (["run", "model.gguf", "-p", "hi", "--maxtokens", "3"], "--max-tokens"),
        (["plan", "model.gguf", "--rows", "0"], "--rows"),
        (["graph"], "MODEL"),
        (["graph", "model.gguf", "another.gguf"], "another.gguf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_usage_error_is_one_line_that_names_the_argument_and_the_help(arguments: list[str], hint: str):
    command = "kernelmux" if arguments == ["nope"] else f"kernelmux {arguments[0]}"
    assert_one_line_error(call_command(*arguments), hint, f"{command} --help tells what there is")


def test_an_error_has_no_traceback_and_no_colours_in_a_process_of_its_own(tmp_path: Path):
    result = run_command("plan", tmp_path / "none.gguf")
    assert_one_line_error(result, "none.gguf", "no such file")
    assert "\x1b" not in result.err


def test_ctrl_c_before_the_first_word_exits_with_130_and_no_traceback(monkeypatch: pytest.MonkeyPatch, tiny: Path):
    def interrupted(path: Path, context: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kernelmux.run.model.load", interrupted)
    result = call_command("run", tiny, "-p", "hello")
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err


def test_a_reader_that_stops_early_causes_no_traceback(tiny: Path):
    """As in `kernelmux graph MODEL | head -1`, where the reader has gone before all is written."""
    process = start_command("graph", tiny, "--json")
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=TIMEOUT)
    assert err == b""
