"""The generated pages are those that their sources give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", [pytest.param("conformance", marks=pytest.mark.slow), "ops", "performance", "policy"])
def test_a_generated_page_is_not_stale(page):
    ran = subprocess.run([sys.executable, DOCS / f"{page}.py", "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_every_example_policy_is_sound():
    from kernelmux.contract import registry
    from kernelmux.contract.device import find_device
    from kernelmux.plan.check import check_policy
    from kernelmux.policy.policy import read_policy

    examples = sorted((DOCS.parent / "examples" / "policies").glob("*.toml"))
    assert len(examples) >= 4
    for path in examples:
        assert check_policy(read_policy(path), registry.current(), find_device("cpu")) == [], path.name
