"""rope: pairs of elements as complex numbers, multiplied by a turn that is computed once a launch for q and k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from kernelmux.contract import Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import Rotation
from kernelmux_torch.kernel import TorchKernel


class Rope(TorchKernel):
    """Angles in float64, the multiplication in float32; both pairings, and heads of which only a part turns."""

    ops = ("rope",)
    name = "f32"
    precision = 1e-11
    packed = "f32"
    # Three for the turns; of q and of k the halves gathered, turned and written, and the part that passes.
    on_card = 15
    input_formats = output_formats = ("f32",)

    def workspace(self, node: TensorNode) -> int:
        assert node.rotation is not None
        m, half = node.inputs[0].extents[0], node.rotation.dims // 2
        # Angles (float64), turns (complex128, complex64), and of halves one gathered operand (complex64).
        return m * half * (8 + 16 + 8) + (m * half * node.num_heads * 8 if node.rotation.pairing == "halves" else 0)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        q, k, positions = tensors.inputs
        rotation, scratch = node.rotation, tensors.workspace
        assert rotation is not None
        assert scratch is not None
        shape = (len(positions), rotation.dims // 2)
        # Widest first: a complex128 must start at a multiple of 16 bytes.
        kinds, count = (torch.complex128, torch.float64, torch.complex64), math.prod(shape)
        *parts, rest = torch.split(scratch, [16 * count, 8 * count, 8 * count, len(scratch) - 32 * count])
        exact, angles, turns = (part.view(kind).view(shape) for part, kind in zip(parts, kinds, strict=True))
        magnitude = torch.full(shape, rotation.magnitude, dtype=torch.float64, device=positions.device)
        frequencies = _frequencies(rotation, tensors.packed, positions.device)
        column, per_head = positions.unsqueeze(1), turns.unsqueeze(1)
        turned = [
            call
            for x, y in zip((q, k), tensors.outputs, strict=True)
            for call in _turn(*(t.view(len(t), -1, node.head_dim) for t in (x, y)), rotation, per_head, rest)
        ]

        def launch() -> None:
            torch.mul(column, frequencies, out=angles)
            torch.polar(magnitude, angles, out=exact)
            turns.copy_(exact)
            for call in turned:
                call()

        return launch


def _turn(
    x: torch.Tensor, y: torch.Tensor, rotation: Rotation, turns: torch.Tensor, scratch: torch.Tensor
) -> Sequence[Launch]:
    """The calls that turn x [m, heads, head_dim] into y, which may be the same memory."""
    dims = rotation.dims
    passed = [] if x.data_ptr() == y.data_ptr() or dims == x.shape[2] else [partial(y[..., dims:].copy_, x[..., dims:])]
    if rotation.pairing == "adjacent":
        source, target = (torch.view_as_complex(t[..., :dims].unflatten(-1, (-1, 2))) for t in (x, y))
        return [*passed, partial(torch.mul, source, turns, out=target)]
    # q and k take turns with the scratch: it holds one operand.
    shape = (x.shape[0], x.shape[1], dims // 2)
    gathered = scratch[: 8 * math.prod(shape)].view(torch.complex64).view(shape)
    parts = torch.view_as_real(gathered)
    halves = [(slice(0, dims // 2), parts[..., 0]), (slice(dims // 2, dims), parts[..., 1])]
    return [
        *passed,
        *(partial(part.copy_, x[..., where]) for where, part in halves),
        partial(gathered.mul_, turns),
        *(partial(y[..., where].copy_, part) for where, part in halves),
    ]


def _frequencies(rotation: Rotation, divisors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    frequencies = torch.tensor(rotation.frequencies(), dtype=torch.float64, device=device)
    return frequencies / math.prod(divisors, start=torch.ones((), dtype=torch.float64, device=device))
