"""convert: numbers to each other, and to and from eight bits with a scale for 32."""

from __future__ import annotations

from collections.abc import Mapping

from kernelmux_numba.elementwise import FLOATS, Elementwise


class Convert(Elementwise):
    ops = ("convert",)
    takes: Mapping[str, object] = {"source": (*FLOATS, "q8_32"), "target": (*FLOATS, "q8_32")}
    input_formats = output_formats = ()
