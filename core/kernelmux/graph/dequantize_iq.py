"""GGUF's types of one to three bits that are looked up in large tables, as float32: `IQ1_*` to `IQ3_*`.

Enters: blocks of one type, as bytes [blocks, size]. Leaves: float32 [blocks, columns], to the bit as the gguf package
has them. An index stands for a run of eight or four small integers. The tables are that package's own, taken from it
when a device first needs them; all products but the last are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from kernelmux.graph.bit_fields import half, in_order, words

if TYPE_CHECKING:
    import torch


@cache
def _grid(name: str, device: torch.device) -> torch.Tensor:
    """A type's table: runs of eight or four int8, each run as one number, so that a lookup moves it whole.

    The integers of `IQ1_*` are moved up or down by an eighth: they are eight times as large here, with 1 added, and in
    the table's second half with 1 subtracted.
    """
    import gguf.quants
    import torch

    table = getattr(gguf.quants, name)
    table.init_grid()
    runs = torch.from_numpy(table.grid).to(torch.int8).view(table.grid_shape)
    if name.startswith("IQ1"):
        runs = torch.cat([8 * runs + 1, 8 * runs - 1])
    return runs.view(torch.int64 if runs.shape[1] == 8 else torch.int32).flatten().to(device)


@cache
def _signs(bits: int, device: torch.device) -> torch.Tensor:
    """Eight signs, 1 or -1 as int8, for each number of 8 bits, or of 7: each eight as one number."""
    import gguf.quants
    import torch

    # Of seven bits the table has the eighth.
    stored = gguf.quants.IQ2_XXS.ksigns if bits == 7 else bytes(range(256))
    negative = in_order(torch.tensor(list(stored), dtype=torch.uint8).unsqueeze(1), 1)
    return (1 - 2 * negative.to(torch.int8)).view(torch.int64).flatten().to(device)


def _looked_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A table's runs for indices [blocks, w], beside each other: int8 [blocks, columns]."""
    import torch

    return table.index_select(0, indices.flatten().int()).view(torch.int8).view(len(indices), -1)


def _scaled(levels: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Integers [blocks, columns] by steps [blocks, w], each for as many columns."""
    return levels.view(*steps.shape, -1).float().mul_(steps.unsqueeze(2)).flatten(1)


def _wide(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Indices whose first eight bits are one field, and what is above them another."""
    return low.int() | high.int() << 8


def _four(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The first four fields of so many bits of each number [blocks, w], lowest first: [blocks, 4 w]."""
    import torch

    shifts = torch.arange(0, 4 * bits, bits, dtype=numbers.dtype, device=numbers.device)
    return (numbers.unsqueeze(2) >> shifts).bitwise_and_(2**bits - 1).flatten(1)


def _signed(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs, and scales of four bits, of numbers of 32 bits: four times seven bits, and what is above them."""
    import torch

    numbers = words(packed, torch.int32)
    return _looked_up(_signs(7, packed.device), _four(numbers, 7)), (numbers >> 28 & 15).float()


def _iq2_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """Eight runs of 32: four bytes of indices each, then a number of signs and scale."""
    runs = blocks[:, 2:].view(-1, 8, 8)
    signs, scales = _signed(runs[..., 4:].flatten(1))
    levels = _looked_up(_grid("IQ2_XXS", blocks.device), runs[..., :4].flatten(1)).mul_(signs)
    return _scaled(levels, half(blocks, 0) * (0.5 + scales) * 0.25)


def _iq2_xs(blocks: torch.Tensor) -> torch.Tensor:
    """Sixteen runs of sixteen, each with a scale of four bits; of eight nine bits are the index, seven the signs."""
    low, high = blocks[:, 2:66:2], blocks[:, 3:66:2]
    signs = _looked_up(_signs(7, blocks.device), high >> 1)
    levels = _looked_up(_grid("IQ2_XS", blocks.device), _wide(low, high & 1)).mul_(signs)
    return _scaled(levels, half(blocks, 0) * (0.5 + in_order(blocks[:, 66:], 4).float()) * 0.25)


def _iq2_s(blocks: torch.Tensor) -> torch.Tensor:
    """As IQ2_XS, with ten bits of index and eight of signs."""
    indices = _wide(blocks[:, 2:34], in_order(blocks[:, 66:74], 2))
    signs = _looked_up(_signs(8, blocks.device), blocks[:, 34:66])
    levels = _looked_up(_grid("IQ2_S", blocks.device), indices).mul_(signs)
    return _scaled(levels, half(blocks, 0) * (0.5 + in_order(blocks[:, 74:], 4).float()) * 0.25)


def _iq3_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """Eight runs of 32: eight bytes of indices each, and a number of signs and scale."""
    signs, scales = _signed(blocks[:, 66:])
    levels = _looked_up(_grid("IQ3_XXS", blocks.device), blocks[:, 2:66]).mul_(signs)
    return _scaled(levels, half(blocks, 0) * (0.5 + scales) * 0.5)


def _iq3_s(blocks: torch.Tensor) -> torch.Tensor:
    """Eight runs of 32, each with a scale of four bits; nine bits of index for each four columns, a sign for each."""
    indices = _wide(blocks[:, 2:66], in_order(blocks[:, 66:74], 1))
    signs = _looked_up(_signs(8, blocks.device), blocks[:, 74:106])
    levels = _looked_up(_grid("IQ3_S", blocks.device), indices).mul_(signs)
    return _scaled(levels, half(blocks, 0) * (1 + 2 * in_order(blocks[:, 106:], 4)).float())


def _iq1_s(blocks: torch.Tensor) -> torch.Tensor:
    """Eight runs of 32, a number of 16 bits each: four upper three bits of indices, the scale's three, the shift's."""
    import torch

    numbers = words(blocks[:, 34:], torch.int16)
    shifted = (numbers < 0).repeat_interleave(4, dim=1)
    levels = _looked_up(_grid("IQ1_S", blocks.device), _wide(blocks[:, 2:34], _four(numbers, 3) | shifted << 3))
    return _scaled(levels, half(blocks, 0) * (2 * (numbers >> 12 & 7) + 1).float() * 0.125)


def _iq1_m(blocks: torch.Tensor) -> torch.Tensor:
    """Sixteen runs of sixteen; above each index's byte four bits, the last of them the shift's.

    Of four numbers of 16 bits the last four each are the block's float16 scale, the others the runs', of three bits.
    """
    import torch

    last = blocks[:, 49::2]
    scale = words(last[:, ::2] >> 4 | last[:, 1::2] & 0xF0, torch.float16).float()
    levels = _looked_up(_grid("IQ1_M", blocks.device), _wide(blocks[:, :32], in_order(blocks[:, 32:48], 4)))
    return _scaled(levels, scale * (2 * _four(words(blocks[:, 48:], torch.int16), 3) + 1).float() * 0.125)


UNPACK_IQ: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{"IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s},
    **{"IQ1_S": _iq1_s, "IQ1_M": _iq1_m},
}
"""By type: float32 [blocks, columns] of blocks [blocks, bytes]."""
