"""`kernelmux graph`: a model's nodes, as a table, Graphviz DOT or JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from kernelmux.cli.common import Context, Json, ModelPath, refuse_together
from kernelmux.cli.output import line_width, tell

if TYPE_CHECKING:
    from kernelmux.graph.formats import Value
    from kernelmux.graph.graph import Graph, TensorNode


def graph(
    model: ModelPath,
    dot: Annotated[bool, typer.Option("--dot", help="Graphviz DOT.")] = False,
    context: Context = None,
    json: Json = False,
) -> None:
    """Show a model's compute graph: every node with its op, inputs, outputs and weights."""
    from kernelmux.models import open_model

    refuse_together("--dot" if dot else "", json=json)
    built = open_model(model, context or 0).graph
    if json:
        tell(built.to_json())
    elif dot:
        tell(to_dot(built))
    else:
        for line in _lines(built, line_width()):
            tell(line)


def _lines(graph: Graph, width: int) -> Iterator[str]:
    """The graph as a table, alike layers as one row."""
    from kernelmux.plan.table import grouped, short, table, wrapped

    rows = [(short(name), *cells) for name, cells in grouped((node.name, _cells(node)) for node in graph.ops)]
    title = f"{graph.name}: {len(graph.ops)} nodes; inputs as .name are of the same layer, as -1.name of the one before"
    yield from wrapped(title, width, "  ")
    yield ""
    yield from table(("node", "op", "inputs", "outputs", "weights"), rows, width)


def _cells(node: TensorNode) -> tuple[str, str, str, str]:
    """Op, inputs, outputs and weights of a node, in words that are the same for alike nodes of all layers."""
    from kernelmux.plan.table import first_layer, relative

    layer = first_layer(node.name)
    inputs = [value.name for value in node.inputs]
    if layer is not None:
        inputs = [re.sub(r"^\w+\.\{(-?\d+)\}", _offset, relative(name, layer)) for name in inputs]
    return node.op, " ".join(inputs), _types(node.outputs), _types(node.weights)


def _offset(found: re.Match[str]) -> str:
    return found[1] if found[1] != "0" else ""


def _types(values: Iterable[Value]) -> str:
    """Formats and extents, equal ones counted: `f32[m,64] x2`."""
    counts = Counter(_type(value) for value in values)
    return " ".join(kind if count == 1 else f"{kind} x{count}" for kind, count in counts.items())


def to_dot(graph: Graph) -> str:
    """The graph in Graphviz's language: a box an op, an edge a value; weights stand inside their node."""
    lines = [f"digraph {_quoted(graph.name)} {{", " rankdir=TB; node [shape=box, fontname=Helvetica];"]
    producer = {value.name: node for node in graph.nodes for value in node.outputs}
    for node in graph.nodes:
        if node.op != "leaf":
            text = "\\n".join([f"{node.op} {node.name}", *(_type(weight) for weight in node.weights)])
            lines.append(f" {_quoted(node.name)} [label={_quoted(text)}];")
        elif node.role != "weight":
            lines.append(f" {_quoted(node.name)} [shape=ellipse, label={_quoted(node.name)}];")
    for node in graph.ops:
        for value in node.inputs:
            source = producer[value.name]
            lines.append(f" {_quoted(source.name)} -> {_quoted(node.name)} [label={_quoted(_type(value))}];")
    return "\n".join([*lines, "}"])


def _type(value: Value) -> str:
    return f"{value.format}[{','.join(str(extent) for extent in value.shape)}]"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
