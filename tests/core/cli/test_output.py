"""What comes out of a command: nothing of a backend's, whatever it prints or raises, into any stream there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from command import TIMEOUT, assert_one_line_error, call_command, clean_environment, run_command
from fake_backend import FakeKernel, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from tiny_model import write_tiny_llama

# Each test runs the command, or the suite, in processes of their own.
pytestmark = pytest.mark.slow

NOISY = """
print("noise at import")
import sys, torch
from kernelmux.contract import Kernel, hookimpl
CONTRACT = 2
class Silu(Kernel):
    ops, name, precision, devices = ("silu",), "s", 1e-10, ("cpu",)
    input_formats = output_formats = ("f32",)
    def bind(self, node, tensors, stream):
        print("noise of bind")
        (x,), (y,) = tensors.inputs, tensors.outputs
        def launch():
            sys.stdout.write("noise of a launch")
            torch.mul(x, torch.sigmoid(x), out=y)
        return launch
@hookimpl
def kernel_classes():
    print("noise of a hook")
    return [Silu]
"""
RAISES = {
    "import": "class Gone(BaseException): pass\nraise Gone('boo')\n",
    "hook": NOISY.replace('    print("noise of a hook")', "    raise SystemExit(0)"),
}


def install(folder: Path, name: str, source: str) -> dict[str, str]:
    """A backend in a folder as an installed one, and the environment that finds it."""
    (folder / f"{name}_module.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kernelmux.backends]\n{name} = {name}_module\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def shell(script: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[bytes]:
    """`$RUN "$@"` within a shell's script, which has streams of its own."""
    words = ["sh", "-c", script, "sh", *map(str, arguments)]
    environment = clean_environment({"RUN": f"{sys.executable} -m kernelmux", **env})
    return subprocess.run(words, capture_output=True, timeout=TIMEOUT, env=environment, check=False)


def answers(tiny: Path) -> tuple[object, ...]:
    return ("run", tiny, "-p", "hello", "--max-tokens", 2)


def test_what_a_backend_prints_is_no_part_of_json(tiny: Path, tmp_path: Path):
    env = install(tmp_path, "noisy", NOISY)
    result = run_command(*answers(tiny), "--use", "silu=noisy", "--json", env=env)
    assert json.loads(result.out)["kernels"]["silu"] == {"noisy:s": 2}
    for place in ("import", "a hook", "bind", "a launch"):
        assert f"noise {'at' if place == 'import' else 'of'} {place}" in result.err


@pytest.mark.parametrize("where", RAISES)
def test_a_backend_that_ends_the_process_is_named_and_the_command_goes_on(tmp_path: Path, where: str):
    result = run_command("backends", "--json", env=install(tmp_path, "rude", RAISES[where]))
    rows = {row["name"]: row for row in json.loads(result.out)["backends"]}
    assert result.code == 0
    assert ("Gone: boo" if where == "import" else "SystemExit") in rows["rude"]["fault"]
    assert rows["torch"]["fault"] == ""


def test_a_launch_that_raises_past_everybody_is_one_line(tiny: Path):
    class Gone(BaseException):
        pass

    def gone(node, tensors):
        raise Gone("boo")

    with registry.isolated(mine=whole_backend(embed=FakeKernel(work=gone))):
        assert_one_line_error(call_command(*answers(tiny)), "mine:f32 raised at ", "Gone: boo")


def test_no_command_prints_by_any_other_way():
    folder = Path(__file__).parents[3] / "core/kernelmux/cli"
    for file in folder.glob("*.py"):
        lines = [line for line in file.read_text().splitlines() if "typer.echo(" in line or " print(" in line]
        assert [line for line in lines if "err=True" not in line] == [], file.name


COMMANDS = {"run": ("-p", "hello", "--max-tokens", 2), "plan": (), "graph": ()}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("stream", "said"), [(">&-", "stdout is closed"), (">/dev/full", "No space left on device")])
def test_a_stdout_that_takes_nothing_is_one_clear_line(tiny: Path, command: str, stream: str, said: str):
    ran = shell(f'$RUN "$@" {stream}', command, tiny, *COMMANDS[command])
    assert ran.returncode == 2
    assert said in ran.stderr.decode().splitlines()[-1]
    assert b"Traceback" not in ran.stderr


def test_without_stderr_a_command_answers(tiny: Path):
    ran = shell('$RUN "$@" 2>&-', "plan", tiny, "--json")
    assert (ran.returncode, json.loads(ran.stdout)["policy"] != "") == (0, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_whole_in_any_encoding(tmp_path: Path, encoding: str):
    path = write_tiny_llama(tmp_path / "m.gguf")
    ran = shell('$RUN "$@"', "run", path, "-p", "hé€🙂", "--max-tokens", 40, "--json", PYTHONIOENCODING=encoding)
    document = json.loads(ran.stdout.decode(encoding))
    assert len(document["ids"]) > 0
    assert bytes(document["prompt_ids"]) is not None


def test_text_has_escapes_for_what_an_encoding_lacks(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "m.gguf", extra={"general.name": "Modèle €"})
    ran = shell('$RUN "$@"', "graph", path, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0
    assert b"Mod\\xe8le \\u20ac" in ran.stdout


def test_a_prompt_is_utf8_whatever_the_locale(tiny: Path):
    ran = shell('$RUN "$@"', "run", tiny, "-p", "é€", "--max-tokens", 1, "--json", LC_ALL="C", PYTHONUTF8="0")
    assert len(json.loads(ran.stdout)["prompt_ids"]) == 5


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="needs root to become somebody else")
@pytest.mark.skipif(
    not all(folder.stat().st_mode & 0o001 for folder in Path(os.__file__).resolve().parents),
    reason="Python lies where somebody else may not look",
)
def test_somebody_without_a_name_a_home_or_a_cache_runs_a_model():
    code = """
        import os, sys
        import kernelmux.cli, torch, typer, rich.console  # Where others may not look.
        from importlib.metadata import entry_points
        os.setuid(54321)
        for name in ("HOME", "XDG_CACHE_HOME", "KERNELMUX_CACHE"):
            os.environ.pop(name, None)
        sys.argv = ["kernelmux", "run", "--random", "tiny:f32", "-p", "hello", "--max-tokens", "2", "--json"]
        kernelmux.cli.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ran = subprocess.run(command, capture_output=True, timeout=TIMEOUT, env=clean_environment(), check=False, cwd="/")
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["ids"]) == 2


def test_a_files_strings_are_never_raw_in_messages(tmp_path: Path):
    evil = "\x1b[31mred\nkernelmux: all is well\x07" + "x" * 300_000
    for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "llama.rope.scaling.type"):
        path = write_tiny_llama(tmp_path / "m.gguf", extra={key: evil})
        result = call_command("run", path, "-p", "hello")
        assert_one_line_error(result)
        assert "\x1b" not in result.err
        assert len(result.err) < 1000
    template = "{{ raise_exception(messages[0].content * 10000) }}"
    path = write_tiny_llama(tmp_path / "m.gguf", extra={"tokenizer.chat_template": template})
    result = call_command("run", path, "-p", "\x1b[31mred", "--chat")
    assert_one_line_error(result, "chat template")
    assert "\x1b" not in result.err
    assert len(result.err) < 1000


def test_a_models_name_does_not_control_the_terminal(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "m.gguf", extra={"general.name": "\x1b]0;mine\x07" + "n" * 300_000})
    for command in (("graph", path), ("plan", path), ("graph", path, "--dot")):
        result = call_command(*command)
        assert result.code == 0
        assert not {"\x1b", "\x07"} & set(result.out + result.err)
        assert len(result.out) < 20_000


def test_what_a_broken_backend_says_does_not_control_the_terminal():
    def raises(node, m):
        raise RuntimeError("\x1b[31m" + "y" * 300_000)

    with registry.isolated(bad=backend(silu=raises), good=whole_backend()) as found:
        plan_for(silu_graph(), found)
        result = call_command("backends")
    assert "\x1b" not in result.out
    assert len(result.out) < 10_000
