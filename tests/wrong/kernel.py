"""The right kernel that the wrong ones differ from in one place, and the list of those."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from kernelmux.conformance.testing import backend
from kernelmux.contract import Kernel, on_stream
from kernelmux.graph.formats import as_tuple, dequantize_planes, quantize_planes
from kernelmux.graph.ops import Operands


class Right(Kernel):
    """The op's own reference, in steps of which a wrong kernel replaces one."""

    name = "kernel"
    precision = 1e-11
    dtype = torch.float64

    def packed_bytes(self, node):
        return sum(self.dtype.itemsize * math.prod(value.extents) for value in node.weights)

    def prepare(self, weights, device):
        return tuple(self.stored(weight).dequantize(self.dtype).to(device.torch) for weight in weights)

    def stored(self, weight):
        """A weight as it is decoded."""
        return weight

    def bind(self, node, tensors, stream):
        return on_stream(partial(self.launch, node, tensors), stream)

    def launch(self, node, tensors):
        self.write(node, tensors, self.answer(node, self.read(node, tensors)))

    def read(self, node, tensors):
        """The operands, dense."""
        packed = iter(tensors.packed)
        inputs = [self.dense(value, planes) for value, planes in zip(node.inputs, tensors.inputs, strict=True)]
        return Operands(tuple(inputs), *(tuple(next(packed) for _ in p) for p in (node.weight, node.bias, node.gamma)))

    def dense(self, value, planes):
        return planes if value.format == "i32" else dequantize_planes(value.format, as_tuple(planes), self.dtype)

    def answer(self, node, operands):
        return node.contract.reference(node, operands)

    def write(self, node, tensors, results):
        for value, planes, result in zip(node.outputs, tensors.outputs, results, strict=True):
            quantize_planes(value.format, result, as_tuple(planes))


@dataclass(frozen=True)
class Planted:
    """A wrong kernel, its op, and the name of the check that must catch it."""

    kernel: type[Right]
    op: str
    check: str
    first: str = ""
    """A pattern for the cases that are tried first: it saves time, no more."""
    device: str = "cpu"

    @property
    def right(self):
        """What it is an edit of."""
        return self.kernel.__base__

    def __str__(self):
        return f"{self.op}-{self.kernel.__name__}"


PLANTED: list[Planted] = []


def planted(op, check, first="", device="cpu"):
    """Puts a class on the list."""

    def put(kernel):
        PLANTED.append(Planted(kernel, op, check, first, device))
        return kernel

    return put


def offering(kernel, op):
    """A backend with that one kernel."""
    return backend(**{op: kernel()})


def beyond(tensor, offset):
    """One element of a tensor's memory, counted from its first; it may lie outside."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)
