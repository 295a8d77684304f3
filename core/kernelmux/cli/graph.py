"""`kernelmux graph`: a model's nodes, as a table, Graphviz DOT or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kernelmux.cli.common import Json, ModelPath, print_table

if TYPE_CHECKING:
    from kernelmux.graph.formats import Value
    from kernelmux.graph.graph import Graph


def graph(
    model: ModelPath,
    dot: Annotated[bool, typer.Option("--dot", help="Graphviz DOT.")] = False,
    json: Json = False,
) -> None:
    """Show a model's compute graph: every node with its op, inputs, outputs and weights."""
    from kernelmux.models import open_model

    built = open_model(model).graph
    if json:
        typer.echo(built.to_json())
    elif dot:
        typer.echo(to_dot(built))
    else:
        rows = [
            (
                node.name,
                node.op,
                " ".join(value.name for value in node.inputs),
                " ".join(_type(value) for value in node.outputs),
                " ".join(_type(value) for value in node.weights),
            )
            for node in built.ops
        ]
        print_table(("node", "op", "inputs", "outputs", "weights"), rows, f"{built.name}: {len(rows)} nodes")


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
