"""Tables that fit a screen: alike layers are one row, `blk.0..29.attn_q`, and lines keep within so many columns.

Enters: rows about nodes, by name. Leaves: fewer rows, and lines of text.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TypeVar

WIDTH = 100
"""Columns of a line, where no terminal says otherwise."""
NAME_WIDTH = 36
_LEAST_WIDTH = 8
_LAYER = re.compile(r"(?<=[.+])\d+(?=\.)")

Cells = TypeVar("Cells", bound=Hashable)


def grouped(rows: Iterable[tuple[str, Cells]]) -> list[tuple[str, Cells]]:
    """Rows whose names differ in the layer alone and whose cells are equal as one; all of a name stand together."""
    alike: dict[str, dict[Cells, list[int]]] = {}
    for name, cells in rows:
        layer = first_layer(name) or 0
        alike.setdefault(relative(name, layer), {}).setdefault(cells, []).append(layer)
    return [(_absolute(name, layers), cells) for name, found in alike.items() for cells, layers in found.items()]


def first_layer(name: str) -> int | None:
    """The first number of a layer in a name; None where it has none."""
    found = _LAYER.search(name)
    return int(found[0]) if found else None


def relative(name: str, layer: int) -> str:
    """A name with its layers counted from `layer`, so that alike names of any layer are equal: `blk.{0}.attn_q`."""
    return _LAYER.sub(lambda number: f"{{{int(number[0]) - layer}}}", name)


def _absolute(name: str, layers: Sequence[int]) -> str:
    """A relative name with these layers: `blk.0..3,8.attn_q`."""

    def counted(offset: re.Match[str]) -> str:
        return spans((layer, layer) for layer in sorted(int(offset[1]) + layer for layer in layers))

    return re.sub(r"\{(-?\d+)\}", counted, name)


def members(name: str, known: Iterable[str]) -> list[str]:
    """The names among those known that a row of a table stands for: `blk.0..3.attn_q`, or one that is known itself."""
    listed = re.search(r"(?<=[.+])[\d.,]*\d(?=\.[^\d.])", name)
    layers = [layer for low, high in _spans(listed[0] if listed else "") for layer in range(low, high + 1)]

    def meant(other: str) -> bool:
        layer = first_layer(other)
        if other == name or layer is None or layer not in layers:
            return other == name
        whole = _absolute(relative(other, layer), layers)
        return name in (whole, short(whole))

    known = list(known)
    found = [other for other in known if meant(other)]
    if len(found) == max(len(layers), 1):
        return found
    # What a row leaves out of a long name, or of many layers, may be anything.
    parts = re.split(r"\d[\d.,]*,\.\.,[\d.,]*\d(?=\.)|(?<=\+)\.\.(?=\+)", name)
    pattern = re.compile(".+".join(map(re.escape, parts)))
    return [other for other in known if pattern.fullmatch(other)] if len(parts) > 1 else []


def _spans(listed: str) -> Iterator[tuple[int, int]]:
    """`0..3,8` as pairs, both ends included."""
    for low, high in re.findall(r"(\d+)(?:\.\.(\d+))?", listed):
        yield int(low), int(high or low)


def listed(names: Iterable[str]) -> str:
    """Names in a row, alike layers as one, and the layers said once: `blk.0..29.attn_q, attn_k`."""
    by_layers: dict[str, list[str]] = {}
    for name, _ in grouped((name, None) for name in names):
        layers = name.rpartition(".")[0] if ".." in name else name
        by_layers.setdefault(layers, []).append(name[len(layers) + 1 :] if ".." in name else "")
    return ", ".join(f"{layers}.{', '.join(rest)}" if rest[0] else layers for layers, rest in by_layers.items())


def merged(walks: Iterable[Iterable[str]]) -> list[str]:
    """The names of several walks in one order: what only a later one has stands behind what it follows there."""
    order: list[str] = []
    known: set[str] = set()
    for walk in walks:
        place = 0
        for name in walk:
            if name in known:
                place = order.index(name) + 1
            else:
                order.insert(place, name)
                known.add(name)
                place += 1
    return order


def spans(ranges: Iterable[tuple[int, int]]) -> str:
    """Ascending ranges, ends included, those that touch as one: `0..3,8`."""
    joined: list[tuple[int, int]] = []
    for low, high in ranges:
        if joined and joined[-1][1] + 1 == low:
            low = joined.pop()[0]
        joined.append((low, high))
    return ",".join(f"{low}" if low == high else f"{low}..{high}" for low, high in joined)


def short(name: str) -> str:
    """A name with the middle of what it lists left out, where that is long: `blk.0..31.ffn_gate+..+ffn_mul`."""
    for middle, left in ((r"\+.*\+", "+..+"), (r"(?<=\d),[\d.,]+,(?=\d)", ",..,")):
        name = re.sub(middle, left, name) if len(name) > NAME_WIDTH else name
    return name


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], width: int, crop: bool = False) -> Iterator[str]:
    """Lines of aligned cells, two spaces or more between them and none empty.

    Where they are too wide, the widest columns wrap; with `crop` each row is one line, and the last column is cut.
    """
    cells = [[str(cell) or "-" for cell in row] for row in (headings, *rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    # Names are broken last: a column shrinks to its longest word before any shrinks further.
    least = [max(len(word) for cell in column for word in cell.split()) for column in columns]
    while (excess := sum(widths) + 2 * (len(widths) - 1) - width) > 0 and max(widths) > _LEAST_WIDTH:
        if crop:
            widths[-1] = max(widths[-1] - excess, _LEAST_WIDTH)
            break
        loose = [size if size > word else 0 for size, word in zip(widths, least, strict=True)]
        sizes = loose if any(loose) else widths
        widths[sizes.index(max(sizes))] -= 1
    for row in cells:
        shown = ([_cut(cell, size)] if crop else wrapped(cell, size) for cell, size in zip(row, widths, strict=True))
        for parts in zip_longest(*shown, fillvalue=""):
            yield "  ".join(part.ljust(size) for part, size in zip(parts, widths, strict=True)).rstrip()


def wrapped(line: str, width: int, indent: str = "") -> list[str]:
    """A line broken between words, what goes over indented."""
    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _cut(cell: str, width: int) -> str:
    return cell if len(cell) <= width else f"{cell[: width - 2].rstrip()}.."
