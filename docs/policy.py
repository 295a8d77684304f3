"""Makes docs/policy.md and policy.schema.json from the grammar: `python docs/policy.py` (`--check` only compares)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from kernelmux.policy.grammar import TABLES, Document, Selectors, Table

HERE = Path(__file__).parent

HEAD = """# The policy file

A policy is a TOML file that says which kernel runs which op. It is data only: no expressions, no includes.
`kernelmux policy check FILE [--model MODEL]` finds its mistakes; [policy.schema.json](policy.schema.json) lets an
editor complete and check it. Its exit code is 0 where there is nothing to say, 1 where there are
findings, 2 where a file cannot be read. Made by `python docs/policy.py` from `kernelmux/policy/grammar.py`.

For every node, at every row count: the **first rule** that matches decides. Its `use` is tried in order; after it come
the defaults, then every other installed backend, unless the rule says `on_unsupported = "error"`. `--use OP=KERNEL` on
the command line is a rule before all others. `kernelmux plan MODEL` shows which rule decided, `--why NODE` why others
lost.

A fused op (`qkv`, `gate_up_swiglu`, ...) stands in for plain ones where its kernel would have been chosen for them: it
has the name of those that read weights, and the backend of the rest; under `auto`, where that is faster. A rule that
names a fused op decides for itself: `use = "parts"` says that no kernel takes the fused node there, and its plain nodes
run, each by its own rule. After kernels (`use = ["triton:bf16", "parts"]`) it holds where none of them takes the node.

What is named and cannot be had (a backend that is quarantined or not installed, a kernel that `forbid` excludes) is
told aloud, and is an error where `--use` asks for it or its rule says `error`. A rule or requirement that matches no
node is told, too; so is a rule, a `--use` or the defaults of which no node got anything that they name, because all
of it declines, with the first reason: only `on_unsupported` makes that silent (`next`) or an error (`error`).
`default` in place of a file is the policy that holds without one.

A backend in place of a kernel stands for all of its kernels, in its own order: first those that keep to the error that
the default allows, unless the policy has a `max_error`. Its roughest comes only where it has no other, or is named.

`auto` in place of a kernel takes whatever is predicted to be the fastest **together**, for the whole graph at each row
count: kernels, conversions between them and fused ops. A kernel's time is the one that was measured on such a device
(tables that backends ship; of other sizes in proportion), else its cost over the device's ceilings times the efficiency
that it declares; `--why` says each candidate's, and where it is from. Rules stand above it. What it keeps to:

- **error**: unless `max_error` says otherwise, a kernel may add no more than the weight's own storage has: 7e-3
  (NMSE) for 4-bit weights, 2e-3 for 5 bits, 4e-4 for Q6_K, 2e-4 for Q8_0, 8e-5 for 16 bits and between the products,
  1e-6 for float32; for FP8 weights 1e-2, which lets in kernels that read activations in FP8 too. It adds its own
  bound, and what is lost where it reads or writes float32 in narrower formats alone. What the graph hands back is not
  rounded on its way. A kernel that reads float16 alone is left out where the weights are not in it. Of two that are
  equally fast the more exact one is taken. So the default's divergence from float32 is at most 2e-3 nats a token, as
  `make test-slow` measures on SmolLM2 in 4 bits.
- **proof**: a kernel that fails smoke cases under `kernelmux check` on this machine is on record, and nobody gets it
  unasked, neither by `auto` nor by the default policy, until all its smoke cases of that op pass, or its source, its
  libraries or the card are others. Who names it in a rule, or by `--use`, gets it, and the plan says so.
- **memory**: packed forms are those that one row wants, and others that the most rows want where that saves a tenth of
  the time and all of them fit four fifths of the device's memory. No other row count adds one. Where more rows need a
  second form that has no room, or that `copies` does not allow, steps have fewer rows, and the plan says how many. A
  card that is only described has the memory of its kind.

A rule moves what surrounds it, too: what `auto` takes next to a kernel fits its formats, and one that packs weights
anew may leave other row counts no second copy. `kernelmux plan --diff default FILE` shows every node that moves.

`tuned_for` names the class of devices that a policy was measured on, as `kernelmux tune` writes it. A plan for another
one says so; `plan`, `run` and `bench model` with `--strict` stop there with exit code 1, as at whatever else a plan has
to tell aloud. A kernel that raises stops them then, too, whatever `on_error` says.

The default policy leaves everything to `auto`. `extends = "default"` begins with its rules and keys.

The policy `exact` gives float32's tokens: `auto` with `max_error = 1e-9`, so that weights are dequantised and float32
is multiplied, stored and cached. `--exact` asks for it; `extends = "exact"` puts rules before it, as `--use` does.

```toml
[[rule]]
op = "mul_mat"
m = "1..8"                     # decode, and small batches
weight = ["Q4_0", "Q4_1"]
use = ["torch:int4"]

[[rule]]
op = "mul_mat"
layer = "0..1"                 # the first two layers of a prompt
use = ["torch:f32", "reference"]
max_error = 1e-8               # no kernel with a looser bound

[[require]]                    # or there is no plan
op = "attention"
kernel = "torch"

[defaults]
use = ["torch", "reference"]
on_error = "next"              # a kernel that raises is replaced, and the step run again

[kv]
format = "bf16"

[weights]
copies = 2                     # one packed form of a weight for decode, one for prompts
```

Ranges are written `5`, `"1..16"`, `"17.."` or `"..16"`, both ends included. A key that takes a list takes a string too.
"""

TITLES = {
    "": "Top level",
    "rule": "`[[rule]]`",
    "require": "`[[require]]`",
    "defaults": "`[defaults]`",
    "kv": "`[kv]`",
    "weights": "`[weights]`",
}


def render() -> str:
    """The page: its head, then each table's keys."""
    sections = [_section("", Document), _selectors()]
    sections += [_section(name, table) for name, table in TABLES.items()]
    return "\n".join([HEAD, *sections])


def _selectors() -> str:
    head = "## Selectors\n\nRules and requirements match the nodes for which every selector given holds.\n"
    return f"{head}\n{_rows(Selectors, [])}\n"


def _section(name: str, table: type[Table]) -> str:
    inherited = list(Selectors.model_fields) if issubclass(table, Selectors) else []
    text = (table.__doc__ or "").strip()
    note = "Selectors, as above, and:\n\n" if inherited else ""
    return f"## {TITLES[name]}\n\n{text}\n\n{note}{_rows(table, inherited)}\n"


def _rows(table: type[Table], leave_out: list[str]) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, field in table.model_fields.items():
        if key not in leave_out:
            lines.append(f"| `{key}` | {_default(field)} | {field.description} |")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(needed)"
    return f"`{json.dumps(field.default)}`" if isinstance(field.default, bool | str) else ""


def main() -> None:
    pages = {
        HERE / "policy.md": render(),
        HERE / "policy.schema.json": json.dumps(Document.model_json_schema(), indent=1) + "\n",
    }
    for path, text in pages.items():
        if "--check" not in sys.argv:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            sys.exit(f"docs/{path.name} is stale: python docs/policy.py")


if __name__ == "__main__":
    main()
