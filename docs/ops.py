"""Makes docs/ops.md from the ops' own contracts: `python docs/ops.py` (`--check` only compares)."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from kernelmux.contract.hookspecs import Hooks
from kernelmux.graph.ops import OPS, Fused, Op

PAGE = Path(__file__).with_name("ops.md")
HEAD = """# The ops

Each is one file of `kernelmux/ops/`: contract, float64 reference, cost and conformance cases. Made by
`python docs/ops.py` from those files. A kernel may write an output over an input where the op says "may share".
"""


def render() -> str:
    """The page: a section an op, plain ones first."""
    return "\n".join([HEAD, *(_section(op) for op in OPS.values())])


def _section(op: Op) -> str:
    formula, *rest = inspect.cleandoc(op.__doc__ or "").split("\n\n", 1)
    lines = [f"## {op.name}", "", *(f"    {line}" for line in formula.splitlines()), ""]
    for entry in _entries(rest[0] if rest else ""):
        lines.append(f"- {entry}")
    fields = [*op.fields, *(f"{field} (optional)" for field in op.optional)]
    if fields:
        lines.append(f"- Node fields: {', '.join(fields)}.")
    if isinstance(op, Fused):
        lines.append(f"- Equals: {' -> '.join(part.op for part in op.pattern)}.")
    hook = getattr(Hooks, f"dispatch_{op.name}")
    arguments = ", ".join(list(inspect.signature(hook).parameters)[1:])
    lines.append(f"- Hook: `dispatch_{op.name}({arguments})`.")
    return "\n".join([*lines, ""])


def _entries(text: str) -> list[str]:
    """`Axes: ...`, `Inputs: ...` and so on, each on one line."""
    entries: list[str] = []
    for line in text.splitlines():
        if line.split(":")[0] in ("Axes", "Inputs", "Outputs", "Fields", "Constraints", "Numerics"):
            entries.append(line)
        elif entries:
            entries[-1] += f" {line.strip()}"
    return entries


if __name__ == "__main__":
    if "--check" in sys.argv:
        fresh = PAGE.exists() and PAGE.read_text("utf-8") == render()
        sys.exit(0 if fresh else "docs/ops.md is stale: python docs/ops.py")
    PAGE.write_text(render(), "utf-8")
