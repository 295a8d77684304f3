"""Makes docs/performance.md from docs/results/*.json: `python docs/performance.py` (`--check` only compares)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = """# Performance

Made by `python docs/performance.py` from `docs/results/`; a number that is not in such a file is not claimed.
"""


def render() -> str:
    """The page: one section a result file, in the order of their names."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted((HERE / "results").glob("*.json"))]
    return "\n".join([HEAD, *(_section(result) for result in results)])


def _section(result: dict[str, Any]) -> str:
    columns = list(result["rows"][0])
    lines = [f"## {result['title']}", "", f"{result['machine']}. {result['method']}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in result["rows"]]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += ["", f"{versions}; commit {result['commit']}, {result['date']}."]
    return "\n".join([*lines, *(f"\n{note}" for note in result.get("notes", [])), ""])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " to ".join(str(part) for part in value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    page = HERE / "performance.md"
    if "--check" in sys.argv:
        sys.exit(
            0 if page.read_text("utf-8") == render() else "docs/performance.md is stale: python docs/performance.py"
        )
    page.write_text(render(), "utf-8")
