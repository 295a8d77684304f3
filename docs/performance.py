"""Makes docs/performance.md, and its plot, from docs/results/*.json: `python docs/performance.py`.

`--check` only compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from choices import PLOT, predictions, section
from tables import head, line, provenance

HERE = Path(__file__).parent
CHOICE = "-choice"
"""In the names of results of tests/bench/compare_choices.py."""
HEAD = """# Performance

Made by `python docs/performance.py` from `docs/results/`; a number that is not in such a file is not claimed.
"""


def render(results: Path) -> dict[str, str]:
    """The page and its plot, by their paths in docs: the choice first, then a section a file, as they are called."""
    read = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))}
    choices = [result for name, result in read.items() if CHOICE in name]
    parts, plots = [section(result) for result in choices], {}
    if (predicted := predictions(choices)) is not None:
        told, plots[PLOT] = predicted
        parts.append(told)
    parts += [_section(result) for name, result in read.items() if CHOICE not in name]
    return {"performance.md": "\n".join([HEAD, *parts]), **plots}


def _section(result: dict[str, Any]) -> str:
    columns = list(result["rows"][0])
    lines = [f"## {result['title']}", "", f"{result['machine']}. {result['method']}.", ""]
    lines += [*head(columns), *(line([_cell(row.get(column)) for column in columns]) for row in result["rows"])]
    return "\n".join([*lines, "", *provenance(result)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " to ".join(str(part) for part in value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    made = {HERE / name: text for name, text in render(HERE / "results").items()}
    if "--check" in sys.argv:
        stale = [path for path, text in made.items() if not path.exists() or path.read_text("utf-8") != text]
        sys.exit(f"{' and '.join(map(str, stale))} stale: python docs/performance.py" if stale else 0)
    for path, text in made.items():
        path.write_text(text, "utf-8")
