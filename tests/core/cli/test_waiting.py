"""Torch's threads sleep while they wait where others run, unless users say how they are to wait."""

from __future__ import annotations

import os
import sys

import pytest

from kernelmux.cli import waiting


@pytest.fixture
def load(tmp_path, monkeypatch):
    """What the system says: how many processes run, of how many."""
    monkeypatch.setattr(waiting, "RUNNING", tmp_path / "loadavg")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in waiting.ASKED:
        monkeypatch.delenv(name, raising=False)
    yield lambda said: (tmp_path / "loadavg").write_text(said)
    os.environ.pop("OMP_WAIT_POLICY", None)


@pytest.mark.parametrize(("running", "policy"), [("1/321", None), ("2/321", "passive"), ("5/321", "passive")])
def test_threads_sleep_where_somebody_else_runs(load, running: str, policy: str | None):
    load(f"0.52 0.58 0.59 {running} 4711\n")
    waiting.wait_by_load()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_what_users_say_stands(load, monkeypatch):
    load("0.52 0.58 0.59 9/321 4711\n")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    waiting.wait_by_load()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_a_system_that_tells_nothing_changes_nothing(load):
    waiting.wait_by_load()
    load("what?\n")
    waiting.wait_by_load()
    assert "OMP_WAIT_POLICY" not in os.environ
