"""route, mul_mat_id and expert_sum on the CPU: rows are grouped by expert, each expert's matrix is multiplied once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kernelmux.contract import Efficiency, Launch, Tensors
from kernelmux.contract.device import Device
from kernelmux.contract.weights import dense
from kernelmux.graph.formats import Weight, lookup, planes_of_rows
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops.mul_mat_id import outputs_of
from kernelmux_torch.kernel import FLOATS, TorchKernel

DECODED = {"f32": 0.9, "f16": 0.5, "bf16": 0.1}
"""Of the rate at which memory is read, what is left where weights of a format are made floats; of others BLOCKS."""
BLOCKS = 0.01


class Route(TorchKernel):
    """By a stable sort, which leaves equal logits in their order."""

    ops = ("route",)
    devices = ("cpu",)
    name = "f32"
    precision = 1e-11
    input_formats = FLOATS

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["i32"], FLOATS]

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (logits,), (ids, weights) = tensors.inputs, tensors.outputs
        scale = node.scale or 1.0

        def launch() -> None:
            largest, order = logits.float().sort(dim=-1, descending=True, stable=True)
            if node.sigmoid:
                ids.copy_(order[:, : node.top_k])
                weights.copy_(largest[:, : node.top_k].sigmoid().mul_(scale))
                return
            parts = largest.sub_(largest[:, :1].clone()).exp_()
            chosen = parts[:, : node.top_k]
            total = (chosen if node.renormalize else parts).sum(dim=-1, keepdim=True)
            ids.copy_(order[:, : node.top_k])
            weights.copy_((chosen / total).mul_(scale))

        return launch


class MulMatId(TorchKernel):
    """Weights as they are stored; those of an expert that has rows are made float32 for as long as it takes."""

    ops = ("mul_mat_id",)
    devices = ("cpu",)
    name = "f32"
    precision = 1e-11
    packed = "file"
    dtype = torch.float32
    input_formats: Sequence[str] = ("f32",)
    output_formats: Sequence[str] = ("f32",)

    def reaches(self, node: TensorNode) -> Efficiency:
        return Efficiency(reading=DECODED.get(node.weight[0].format, BLOCKS), multiplying=0.5)

    def packed_bytes(self, node: TensorNode) -> int:
        return node.weight[0].nbytes + sum(4 * bias.extents[0] for bias in node.bias)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        weight, *bias = weights
        planes = (part.to(device.torch) for part in weight.planes)
        return (*planes, *(dense(each, torch.float32, device) for each in bias))

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x, ids), (y,) = tensors.inputs, tensors.outputs
        n, (_, k), top_k = outputs_of(node), node.weight[0].extents, ids.shape[1]
        rows, results, shared = x.view(-1, k), y.view(-1, n), x.shape[1] == k
        of_expert = partial(self.matrix, node, tensors.packed)

        def launch() -> None:
            for expert, places in _grouped(ids).items():
                matrix, bias = of_expert(expert)
                index = torch.tensor(places, device=x.device)
                own = rows[index // top_k if shared else index]
                results[index] = own @ matrix.T if bias is None else torch.addmm(bias, own, matrix.T)

        return launch

    def matrix(
        self, node: TensorNode, packed: tuple[torch.Tensor, ...], expert: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An expert's weight [n, k], and its bias [n] where experts have one."""
        format, n = node.weight[0].format, outputs_of(node)
        own, count = slice(expert * n, (expert + 1) * n), len(lookup(format).planes)
        planes = planes_of_rows(format, packed[:count], own)
        weight = Weight("expert", (n, node.weight[0].extents[1]), format, planes).dequantize(self.dtype)
        return weight, packed[count][own].to(self.dtype) if node.bias else None


class MulMatIdBf16(MulMatId):
    """The same in bfloat16, summed in float32."""

    name = "bf16"
    precision = 5e-5
    dtype = torch.bfloat16
    input_formats = output_formats = ("bf16",)

    def reaches(self, node: TensorNode) -> Efficiency:
        exact = node.weight[0].format == "bf16"
        share = 0.5 if "bf16" in self.device.features else 0.02
        return Efficiency(reading=0.9 if exact else BLOCKS, multiplying=share, arithmetic="bf16")

    def comes_late(self, node: TensorNode) -> bool:
        return "bf16" not in self.device.features


def _grouped(ids: torch.Tensor) -> dict[int, list[int]]:
    """By expert where it stands in `ids`, counted row after row."""
    found: dict[int, list[int]] = {}
    for place, expert in enumerate(ids.flatten().tolist()):
        found.setdefault(expert, []).append(place)
    return found


class ExpertSum(TorchKernel):
    """A product of one row of weights with its experts' rows."""

    ops = ("expert_sum",)
    devices = ("cpu",)
    name = "f32"
    precision = 1e-11
    input_formats = output_formats = ("f32",)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x, weights), (y,) = tensors.inputs, tensors.outputs
        made = x.view(*weights.shape, -1)
        return partial(torch.bmm, weights.unsqueeze(1), made, out=y.unsqueeze(1))
