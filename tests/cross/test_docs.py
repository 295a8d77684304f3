"""The generated pages are those that their sources give."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", [pytest.param("conformance", marks=pytest.mark.slow), "ops", "performance", "policy"])
def test_a_generated_page_is_not_stale(page):
    ran = subprocess.run([sys.executable, DOCS / f"{page}.py", "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_of_one_thing_no_page_speaks_as_of_several():
    """Results keep the words that a script measured by, and pages show them."""
    for page in DOCS.glob("*.md"):
        assert re.findall(r"\bof 1 (?:rows|tokens|sequences|layers|nodes|steps)\b", page.read_text("utf-8")) == [], page


def test_every_example_policy_is_sound():
    from kernelmux.contract import registry
    from kernelmux.contract.device import find_device
    from kernelmux.plan.check import check_policy
    from kernelmux.policy.policy import read_policy

    examples = sorted((DOCS.parent / "examples" / "policies").glob("*.toml"))
    assert len(examples) >= 4
    for path in examples:
        assert check_policy(read_policy(path), registry.current(), find_device("cpu")) == [], path.name
