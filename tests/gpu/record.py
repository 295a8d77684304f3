"""Runs the tests that need a GPU, or a share of them, and writes what came of it: `make gpu-test SHARD=1/2`.

Enters: `--shard K/N`, and pytest's own arguments. Leaves: docs/results/CARD-gpu-test.json, with one row a shard.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import re
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "kernelmux")


class Shard:
    """A pytest plugin that keeps each N-th test, and counts outcomes."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.index - 1 :: self.count]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1


def main() -> int:
    """Exit code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", default="1/1", metavar="K/N")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--commit", default="")
    asked, rest = parser.parse_known_args()
    index, count = map(int, asked.shard.split("/"))
    shard, started = Shard(index, count), time.perf_counter()
    code = pytest.main(["-q", "-m", "gpu", str(ROOT / "tests" / "gpu"), *rest], plugins=[shard])
    row = {
        "shard": asked.shard,
        **{name: shard.outcomes[name] for name in ("passed", "skipped", "failed")},
        "seconds": round(time.perf_counter() - started),
    }
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    path = asked.out / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}-gpu-test.json"
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    rows = [old for old in rows if old["shard"].endswith(f"/{count}") and old["shard"] != asked.shard] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_document(card, sorted(rows, key=lambda r: r["shard"]), asked.commit), indent=1) + "\n")
    return int(code)


def _document(card: str, rows: list[dict[str, object]], commit: str) -> dict[str, object]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    versions["cuda"] = str(torch.version.cuda)
    commit = (
        commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    return {
        "title": f"GPU tests on {card}",
        "machine": card,
        "versions": versions,
        "commit": commit,
        "date": date.today().isoformat(),
        "method": "`make gpu-test`: conformance suite on CUDA, captured against eager, SmolLM2; refusals are skipped",
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
