"""What a command says while something takes long: a bar on a terminal, a line a stage elsewhere, no word if quick."""

from __future__ import annotations

import sys
import time

import pytest

from kernelmux.cli import progress
from kernelmux.cli.progress import ProgressBar
from kernelmux.cli.stages import Stages
from kernelmux.run.progress import PACKING, Progress


def _wait_for(text, capsys: pytest.CaptureFixture[str]) -> str:
    said = ""
    for _ in range(2000):
        said += capsys.readouterr().err
        if text in said:
            return said
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is not in {said!r}")


def test_what_takes_long_is_told_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(progress, "QUIET", 0.02)
    with ProgressBar() as bar:
        bar.begin("planning")
        _wait_for("planning ...\n", capsys)
        bar.show(Progress(PACKING, 10**9, 4 * 10**9))
        _wait_for("packing weights: 1.0 GB of 4.0 GB\n", capsys)
        bar.show(Progress("binding steps", 3, 7))
        _wait_for("binding steps: 3 of 7\n", capsys)


def test_a_stage_that_takes_long_has_one_line_in_a_file(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(progress, "QUIET", 0.02)
    with ProgressBar() as bar:
        bar.show(Progress(PACKING, 0, 4))
        said = _wait_for("packing weights", capsys)
        for done in range(1, 4):
            bar.show(Progress(PACKING, done, 4))
            time.sleep(0.05)
        bar.begin("binding steps")
        said += _wait_for("binding steps", capsys)
    assert said.count("packing weights") == 1


def test_what_is_quick_says_nothing(capsys):
    with ProgressBar() as bar:
        for done in range(3):
            bar.show(Progress(PACKING, done, 3))
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_shows_stage_and_bytes_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar() as bar:
        bar.begin("planning")
        bar.show(Progress(PACKING, 10**9, 4 * 10**9))
        bar._bar.refresh()
        shown = capsys.readouterr().err
    assert "packing weights" in shown
    assert "1.0 GB of 4.0 GB" in shown


def test_a_stage_that_is_told_often_has_the_seconds_of_all_its_parts():
    stages = Stages()
    with ProgressBar(stages) as bar:
        with bar.stage("planning"):
            time.sleep(0.02)
        for done in range(3):
            time.sleep(0.01)
            bar.show(Progress(PACKING, done, 3))
    told = stages.told(0.5)
    assert told["planning"] >= 0.02
    assert told[PACKING] >= 0.03
    assert told["first token"] == pytest.approx(sum(told.values()) / 2)
