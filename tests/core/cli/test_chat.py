"""`kernelmux chat`: lines in, answers out, Ctrl-C for an answer and the end of stdin for the chat."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kernelmux
from command import TIMEOUT, assert_one_line_error, clean_environment, run_command
from kernelmux.cli.ending import SAME
from tiny_model import write_tiny_llama

F32 = ("--use", "*=torch:f32,torch:sdpa,torch:rows")


def start(*arguments: object) -> subprocess.Popen[bytes]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, "-m", "kernelmux", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=clean_environment())
    finally:
        signal.signal(signal.SIGINT, before)


def chat(lines: str | bytes, *arguments: object) -> tuple[int, str, str]:
    process = start("chat", *arguments)
    out, err = process.communicate(lines.encode() if isinstance(lines, str) else lines, timeout=TIMEOUT)
    return process.returncode, out.decode(), err.decode()


def test_each_line_is_answered_with_all_that_was_said_before(tiny: Path):
    model = kernelmux.load(tiny)
    plan = model.plan(use=F32[1:])
    messages: list[dict[str, str]] = []
    for line in ("hello", "a", "there"):
        messages.append({"role": "user", "content": line})
        said = "".join(model.generate(messages, plan, max_tokens=6))
        messages.append({"role": "assistant", "content": said})
    code, out, err = chat("hello\n\na\n  \nthere", tiny, "--max-tokens", 6, *F32)
    assert code == 0, err
    assert out == "".join(f"{message['content']}\n" for message in messages[1::2])
    assert "> " not in out
    assert err.count("the answer was cut") == 3


def test_ctrl_c_ends_the_answer_and_not_the_chat(tmp_path: Path):
    endless = write_tiny_llama(tmp_path / "endless.gguf", context=100_000)
    process = start("chat", endless, "--max-tokens", 90_000, "--context", 100_000, *F32)
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(2):
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(8)
        time.sleep(SAME)  # As a hand would: sooner it is the one before.
        process.send_signal(signal.SIGINT)
        while process.stdout.read(1) != b"\n":
            pass
    process.stdin.close()
    process.stdin = None
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert b"Traceback" not in err


def test_a_terminal_has_commands_that_are_no_messages(tiny: Path):
    """In a pipe they are messages, as all else is."""
    pty = pytest.importorskip("pty")
    near, far = pty.openpty()
    with open(near, "wb", buffering=0) as typed:
        command = [sys.executable, "-m", "kernelmux", "chat", str(tiny), "--max-tokens", "2", *F32]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=far, stdout=pipe, stderr=pipe, env=clean_environment())
        os.close(far)
        typed.write(b"/help\nhello\n/quit\n")
        _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert err.count(b"Ctrl-D or /quit the chat") == 2
    assert err.count(b"the answer was cut") == 1
    code, _, said = chat("/help\n", tiny, "--max-tokens", 2, *F32)
    assert (code, said.count("the answer was cut"), said.count("/quit")) == (0, 1, 0)


def test_a_message_that_does_not_fit_is_told_and_the_next_is_answered(tiny: Path):
    code, out, err = chat("x" * 300 + "\nhello\n", tiny, "--max-tokens", 4, "--context", 128, *F32)
    assert code == 0
    assert out.count("\n") >= 1
    assert "the chat holds 128: shorten it" in err


@pytest.mark.slow
def test_bytes_that_are_no_text_and_a_model_without_a_template_are_one_line(tiny: Path, tmp_path: Path):
    code, out, err = chat(b"\xff\xfe\n", tiny)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "kernelmux: ModelError: stdin: not UTF-8 text (byte 0xff at 0)"
    path = write_tiny_llama(tmp_path / "plain.gguf", extra={"tokenizer.chat_template": None})
    assert_one_line_error(run_command("chat", path), "plain.gguf", "no chat template")
    assert_one_line_error(
        run_command("chat", tiny, "--context", 1000), "1000 tokens was asked for, the model holds 256"
    )
