"""Makes docs/ops.md from the ops' own contracts: `python docs/ops.py` (`--check` only compares).

`python docs/ops.py softcap` prints the sections of ops by name, those too that installed backends bring.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from kernelmux.contract import registry
from kernelmux.errors import nearest
from kernelmux.graph.ops import CORE_OPS, OPS, Fused, Op
from kernelmux.graph.ops.domain import Domain

PAGE = Path(__file__).with_name("ops.md")
HEAD = """# The ops

Each is one file of `kernelmux/graph/ops/`: contract, float64 reference, cost and conformance cases. Made by
`python docs/ops.py` from those files. A kernel may write an output over an input where the op says that it may be that
memory. What the hook is told is also what a kernel's `takes` and a policy's `where` select by. The domain is what
cases are drawn from (docs/conformance.md).
"""


def render() -> str:
    """The page: a section an op, plain ones first."""
    return "\n".join([HEAD, *(_section(OPS[name]) for name in OPS if name in CORE_OPS)])


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
    if domain := op.domain():
        lines.append(f"- Domain: {_domain(domain)}.")
    lines.append(f"- Hook: `dispatch_{op.name}({', '.join(('node', *op.told, 'device'))})`.")
    return "\n".join([*lines, ""])


def _domain(domain: Domain) -> str:
    """`m 1..512; bias; format f32, Q4_0`: what cases are drawn from."""
    said = [f"{name} {extent.low}..{extent.high}" for name, extent in domain.extents.items()]
    for name, values in domain.choices.items():
        said.append(name if values == (False, True) else f"{name} {', '.join(map(_value, values))}")
    return "; ".join(said)


def _value(value: object) -> str:
    if isinstance(value, tuple):
        of_text = all(isinstance(part, str) for part in value)
        return "+".join(dict.fromkeys(value)) if of_text else "/".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _entries(text: str) -> list[str]:
    """`Axes: ...`, `Inputs: ...` and so on, each on one line."""
    entries: list[str] = []
    for line in text.splitlines():
        if line.split(":")[0] in ("Axes", "Inputs", "Outputs", "Fields", "Constraints", "Numerics"):
            entries.append(line)
        elif entries:
            entries[-1] += f" {line.strip()}"
    return entries


def described(names: list[str]) -> str:
    """The sections of ops by name; SystemExit where there is no such op."""
    registry.current()
    for name in names:
        if name not in OPS:
            sys.exit(f"unknown op {name!r}{nearest(name, OPS)}")
    return "\n".join(_section(OPS[name]) for name in names)


if __name__ == "__main__":
    if sys.argv[1:] and "--check" not in sys.argv:
        print(described(sys.argv[1:]), end="")
        sys.exit()
    if "--check" in sys.argv:
        fresh = PAGE.exists() and PAGE.read_text("utf-8") == render()
        sys.exit(0 if fresh else "docs/ops.md is stale: python docs/ops.py")
    PAGE.write_text(render(), "utf-8")
