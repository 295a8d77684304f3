"""The ops and weight formats that backends bring: checked, added to core's, and taken away again.

Enters: what `new_formats` and `new_ops` list. Leaves: OPS and FORMATS with them, or a line that says what was wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

from kernelmux.contract.names import check_op_name
from kernelmux.errors import BackendError, contained, named, nearest
from kernelmux.graph.formats import FORMATS, Format
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import CORE_OPS, OPS, Fused, Op
from kernelmux.graph.ops.cases import brought_weights

Known = tuple[Mapping[str, Op], Mapping[str, Format]]
"""Ops and formats by name."""


def known() -> Known:
    """All that there are now."""
    return dict(OPS), dict(FORMATS)


def make_known(ops: Mapping[str, Op], formats: Mapping[str, Format]) -> None:
    """Has these ops and formats alone exist."""
    for table, wanted in ((OPS, ops), (FORMATS, formats)):
        table.clear()
        table.update(wanted)  # type: ignore[arg-type]


def forget_brought() -> None:
    """Leaves core's own ops and formats."""
    brought = brought_weights()
    make_known(
        {name: op for name, op in OPS.items() if name in CORE_OPS},
        {name: format for name, format in FORMATS.items() if name not in brought},
    )


def add_format(brought: Format) -> None:
    """Adds a format that a backend brings; BackendError where it cannot be used."""
    if brought.name.lower() in {name.lower() for name in FORMATS if FORMATS[name] != brought}:
        raise BackendError(f"it brings a format named {brought.name!r}, which exists already")
    if brought.dequantize is None or brought.draw is None:
        raise BackendError(f"its format {brought.name!r} needs `dequantize` and `draw`: references and cases use them")
    FORMATS[brought.name] = brought


def add_op(op: Op) -> None:
    """Adds an op that a backend brings; BackendError where it is not whole."""
    check_op_name(op.name)
    if op.name in OPS and type(OPS[op.name]) is not type(op):
        raise BackendError(f"it brings an op named {op.name!r}, which exists already")
    if isinstance(op, Fused):
        _check_pattern(op)
    OPS[op.name] = op
    try:
        op.arguments(case_node(next(op.cases())))
    except BaseException as error:
        said = named(contained(error))
        raise BackendError(f"its op {op.name!r} has no sound first case: {said}") from error


def _check_pattern(op: Fused) -> None:
    """BackendError where a pattern names an op that does not exist, or reads what nothing before has produced."""
    subject, values = f"the pattern of {op.name!r}", set(op.inputs)
    for part in op.pattern:
        if part.op not in OPS:
            raise BackendError(f"{subject} names the op {part.op!r}{nearest(part.op, OPS)}")
        for port in part.inputs:
            if port not in values:
                raise BackendError(f"{subject}: {part.op} reads {port!r}{nearest(port, values)}")
        if len(part.outputs) != len(made := OPS[part.op].outputs):
            raise BackendError(f"{subject}: {part.op} has outputs {', '.join(made)}; {len(part.outputs)} are named")
        values.update(part.outputs)
    for port in op.outputs:
        if port not in values:
            raise BackendError(f"{subject} does not produce the output {port!r}{nearest(port, values)}")
