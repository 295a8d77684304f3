"""A case's very numbers, in a safetensors file beside the file of cases: every plane as its tensor's format stores it.

Enters: a case's node, and a path. Leaves: what to draw each of its tensors as. A tensor of one plane is called as the
case calls it, one of several `NAME.PLANE`, as `x.scales`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from kernelmux.errors import GraphError, shown
from kernelmux.files import replacing
from kernelmux.graph.formats import Plane, Value, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops.spreads import Kept
from kernelmux.models.safetensors import read_planes, write_safetensors

ENDING = ".safetensors"


def write_numbers(tensors: Mapping[Value, tuple[torch.Tensor, ...]], path: Path) -> None:
    """Writes the planes of values, called by their names; OSError where the file cannot be written."""
    named = {
        name: part for value, parts in tensors.items() for (name, _), part in zip(_planes(value), parts, strict=True)
    }
    with replacing(path) as file:
        write_safetensors(named, file)


def read_numbers(node: TensorNode, stated: object, folder: Path) -> dict[str, Kept]:
    """The numbers of a node's tensors, from the file of that name; GraphError unless it holds all of them, as stored.

    It lies beside the file of cases, and its name says no more than that.
    """
    if not (isinstance(stated, str) and stated.endswith(ENDING) and Path(stated).name == stated):
        raise GraphError(f"`numbers` names a file beside this one, as 'nan{ENDING}', not {shown(stated)}")
    found, _ = read_planes(folder / stated)
    kept = {}
    for value in (*node.inputs, *node.weights):
        parts = []
        for name, plane in _planes(value):
            shape = plane.shape(value.extents)
            if name not in found or (found[name].dtype, found[name].shape) != (plane.dtype, shape):
                held = f"{found[name].dtype} {list(found[name].shape)}" if name in found else "nothing"
                raise GraphError(f"{stated} must hold {shown(name)} as {plane.dtype} {list(shape)}, it has {held}")
            parts.append(found[name].tensor())
        kept[value.name] = Kept(tuple(parts))
    return kept


def _planes(value: Value) -> Iterator[tuple[str, Plane]]:
    """What each plane of a value is called."""
    planes = lookup(value.format).planes
    for plane in planes:
        yield value.name if len(planes) == 1 else f"{value.name}.{plane.name}", plane
