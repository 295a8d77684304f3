"""The script that holds the default's choice against every backend alone: what it measures, what it says of faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command import TIMEOUT

SCRIPT = Path(__file__).parents[1] / "bench" / "compare_choices.py"


@pytest.mark.slow
def test_every_way_to_run_a_model_has_a_row_or_a_reason(tmp_path: Path):
    policy, out = tmp_path / "tuned.toml", tmp_path / "choice.json"
    policy.write_text('[defaults]\nuse = ["torch:f32", "torch", "reference"]\n', "utf-8")
    rough = tmp_path / "rough.toml"
    rough.write_text('[defaults]\nuse = ["torch:bf16", "torch", "reference"]\n', "utf-8")
    policies = [f"tiny:f32={policy}", f"tiny:f32={rough}", "nowhere.toml"]
    asked = ["--models", "tiny:f32", "tiny:nothing", *(word for path in policies for word in ("--policy", path))]
    command = [sys.executable, SCRIPT, *asked, "--rows", "1", "130", "--rounds", "1", "--context", "20", "--out", out]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert ran.returncode == 0, ran.stderr
    assert "tiny:nothing | ModelError" in ran.stdout
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert {row["m"] for row in rows} == {1, 130}
    found = {row["plan"]: row for row in rows if row["m"] == 130}
    assert set(found) >= {"auto", "tuned", "rough", "nowhere", "reference", "torch"}
    assert found["nowhere"]["fault"].startswith("PolicyError")
    for label in ("auto", "tuned", "reference", "torch"):
        row = found[label]
        assert row["tokens/s"] == pytest.approx(130 / row["us"] * 1e6, rel=0.01)
        assert row["predicted us"] > 0
        assert 0 <= row["measured"] <= 1
    assert found["reference"]["choice"] == "reference:f32 15"
    assert found["tuned"]["choice"] == "torch:f32 15"
    # bfloat16 loses more than float32's storage does.
    assert found["tuned"]["less exact"] == found["reference"]["less exact"] == []
    assert "mul_mat torch:bf16" in found["rough"]["less exact"]
    # Of a backend that is named its exact kernels come first.
    assert found["torch"]["less exact"] == []
