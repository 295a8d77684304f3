"""Reports: everything that is needed to measure again, in the shape that docs/performance.py reads."""

from __future__ import annotations

import json
import platform
import subprocess

from fake_backend import CPU
from kernelmux.contract.device import Device
from kernelmux.measure.report import make_report, save_report


def test_a_report_states_machine_versions_commit_and_date():
    report = make_report("Title", CPU, "medians", [{"work": "x", "us": 1.0}], ["a note"])
    assert list(report) == ["title", "machine", "versions", "commit", "date", "method", "rows", "notes"]
    assert "threads" in report["machine"]
    assert report["versions"]["python"] == platform.python_version()
    assert "torch" in report["versions"]
    assert json.loads(json.dumps(report)) == report


def test_a_card_is_named():
    card = Device("cuda", 0, "NVIDIA H100 80GB HBM3", (9, 0))
    assert make_report("Title", card, "medians", [])["machine"] == "NVIDIA H100 80GB HBM3"


def test_outside_a_checkout_the_commit_is_unknown(monkeypatch):
    def fails(*args, **kwargs):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fails)
    assert make_report("Title", CPU, "medians", [])["commit"] == "unknown"


def test_a_commit_that_is_told_is_stated_and_the_file_is_the_document(tmp_path):
    report = make_report("Tïtle", CPU, "medians", [{"us": [1.0, 2.0]}], commit="abc")
    save_report(report, tmp_path / "result.json")
    assert report["commit"] == "abc"
    text = (tmp_path / "result.json").read_text("utf-8")
    assert json.loads(text) == report
    assert "Tïtle" in text
    assert text.endswith("}\n")
