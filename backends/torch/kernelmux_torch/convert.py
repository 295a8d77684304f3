"""convert: between f32, bf16 and f16 in one torch call, to and from the quantised formats in several."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from kernelmux.contract import Launch, Tensors
from kernelmux.graph.formats import FORMATS, as_tuple, dequantize_planes, quantize_planes
from kernelmux.graph.graph import TensorNode
from kernelmux_torch.kernel import FLOATS, TorchKernel

SCALED = tuple(name for name, format in FORMATS.items() if format.rounding and not format.plain)
"""Activations with scales."""


class Convert(TorchKernel):
    ops = ("convert",)
    takes: Mapping[str, object] = {"source": FLOATS, "target": FLOATS}
    name = "f32"
    precision = 1e-11

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        return partial(tensors.outputs[0].copy_, tensors.inputs[0])


class Quantize(Convert):
    """As core defines the formats, in torch calls."""

    takes = {"source": FLOATS, "target": SCALED}
    # By scale, sums and rounding: whole tensors pass about twenty times.
    on_card = 24
    name = "quantize"
    capturable = False
    input_formats = FLOATS

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), (planes,), format = tensors.inputs, tensors.outputs, node.outputs[0].format
        return lambda: quantize_planes(format, x.float(), planes)


class Dequantize(Convert):
    """As core defines the formats, in torch calls."""

    takes = {"source": SCALED, "target": FLOATS}
    on_card = 6
    name = "dequantize"
    capturable = False
    output_formats = FLOATS

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (planes,), (y,), format = tensors.inputs, tensors.outputs, node.inputs[0].format
        return lambda: y.copy_(dequantize_planes(format, as_tuple(planes)))
