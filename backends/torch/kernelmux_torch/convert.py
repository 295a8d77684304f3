"""convert: between f32, bf16 and f16 in one torch call, to and from the quantised formats in several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Answer, Declined, Kernel, Launch, Tensors
from kernelmux.graph.formats import as_tuple, dequantize_planes, quantize_planes
from kernelmux.graph.graph import TensorNode
from kernelmux_torch.elementwise import FLOATS


def offer(source: str, target: str, device: Device) -> Answer:
    """The one kernel for this pair of formats, or why there is none."""
    if source in FLOATS and target in FLOATS:
        return Convert()
    if source not in FLOATS and target not in FLOATS:
        return Declined(f"it converts to or from {', '.join(FLOATS)}, not from {source} to {target}", "format")
    if device.kind == "cpu":
        return Quantize() if source in FLOATS else Dequantize()
    from kernelmux_torch.cuda import plain

    return plain.Quantize() if source in FLOATS else plain.Dequantize()


class Convert(Kernel):
    name = "f32"
    precision = 1e-11

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        return partial(tensors.outputs[0].copy_, tensors.inputs[0])


class Quantize(Kernel):
    """As core defines the formats, in torch calls."""

    name = "quantize"
    precision = 1e-11
    capturable = False

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (planes,), format = tensors.inputs, tensors.outputs, node.outputs[0].format
        return lambda: quantize_planes(format, x.float(), planes)


class Dequantize(Kernel):
    """As core defines the formats, in torch calls."""

    name = "dequantize"
    precision = 1e-11
    capturable = False

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (planes,), (y,), format = tensors.inputs, tensors.outputs, node.inputs[0].format
        return lambda: y.copy_(dequantize_planes(format, as_tuple(planes)))
