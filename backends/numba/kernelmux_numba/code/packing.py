"""GGUF's blocks taken apart and laid in panels: see kernelmux_numba.packing for both.

The layouts of blocks are those of ggml-common.h in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import int32, types, uint8, uint16

from kernelmux_numba.code.memory import inner, integers, narrow, pointer, word
from kernelmux_numba.code.vectors import stack
from kernelmux_numba.packing import BLOCK, SUPERBLOCK, packing_of
from kernelmux_numba.target import Target

# The words that packing is given.
BLOCKS, ROW_BYTES, ROWS, COUNT, PANELS, PANEL_BYTES, EACH = range(7)
"""Blocks and bytes of a row of them; rows; blocks of 32 in a row; panels, bytes of one, how many are a part."""
STEPS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
"""Bytes of a superblock, and where in it the steps of its scales and minima are, float16."""
octets = pointer(types.uint8)


def pack(target: Target, format: str) -> Callable[[int, int], None]:
    """The panels of a weight in a format."""
    packing, lanes = packing_of(format, target), target.lanes
    bits, flip, fields = packing.bits, packing.centre == 128, packing.fields
    size, scale_size, in_steps = packing.integer_bytes(lanes), packing.scale_bytes(lanes), packing.steps
    take, put_steps, memory = _taken(format), _steps(lanes, format), stack(BLOCK + 16)

    def run(words: int, part: int) -> None:
        at = memory()
        count, rows, row_bytes = word(words, COUNT), word(words, ROWS), word(words, ROW_BYTES)
        first = part * word(words, EACH)
        last = min(first + word(words, EACH), (rows + lanes - 1) // lanes)
        for panel in range(first, last):
            start = word(words, PANELS) + panel * word(words, PANEL_BYTES)
            for lane in range(min(lanes, rows - panel * lanes)):
                source = word(words, BLOCKS) + (panel * lanes + lane) * row_bytes
                for block in range(count):
                    take(source, block, at)
                    _put(bits, flip, lanes, integers(start + block * size), lane, integers(at))
                    scales, found = start + count * size + block * scale_size, at + BLOCK
                    for index in range(fields):
                        if in_steps:
                            octets(scales)[index * lanes + lane] = octets(found)[index]
                        else:
                            narrow(scales)[index * lanes + lane] = narrow(found)[index]
                if in_steps:
                    put_steps(source, count // SUPERBLOCK, start + count * (size + scale_size), lane)

    return run


def _steps(lanes: int, format: str) -> Any:
    """What puts a row's steps, the negative ones of minima, into a lane; nothing where a format has none."""
    size, places = STEPS.get(format, (0, (0,)))
    count, first, last = len(places), places[0], places[-1]

    @inner
    def put(row: int, superblocks: int, to: int, lane: int) -> None:
        into = narrow(to)
        for index in range(superblocks):
            start = row + index * size
            into[index * count * lanes + lane] = narrow(start + first)[0]
            if count == 2:
                into[(index * count + 1) * lanes + lane] = narrow(start + last)[0] ^ uint16(0x8000)

    return put


@inner
def _put(bits: int, flip: bool, lanes: int, into: Any, lane: int, four: Any) -> None:
    """A lane's integers, four a word, in the vectors of a block."""
    if bits == 8:
        for step in range(8):
            into[step * lanes + lane] = four[step] ^ int32(-0x7F7F7F80) if flip else four[step]
        return
    for step in range(4):
        low, high = four[2 * step] & int32(0x0F0F0F0F), four[2 * step + 1] & int32(0x0F0F0F0F)
        into[step * lanes + lane] = low | (high << int32(4))
    if bits == 5:
        more = int32(0)
        for step in range(8):
            more |= ((four[step] >> int32(4)) & int32(0x01010101)) << int32(step)
        into[4 * lanes + lane] = more
    if bits == 6:
        for half in range(2):
            more = int32(0)
            for step in range(4):
                more |= ((four[4 * half + step] >> int32(4)) & int32(0x03030303)) << int32(2 * step)
            into[(4 + half) * lanes + lane] = more


def _taken(format: str) -> Any:
    """What takes one block of 32 of a row: its integers, then its scales and minima go to an address."""
    if format.endswith("_K"):
        return _taken_k(format)
    return _taken_plain(format)


def _taken_plain(format: str) -> Any:
    """Q4_0 to Q8_0: a scale, a minimum, four bytes of fifth bits, each where there is one; then the integers."""
    minimum, fifth, eight = format.endswith("1"), format.startswith("Q5"), format == "Q8_0"
    header = 4 if minimum else 2
    size = header + (4 if fifth else 0) + (32 if eight else 16)
    start = size - (32 if eight else 16)

    @inner
    def take(row: int, block: int, to: int) -> None:
        source, into = octets(row + block * size), octets(to)
        halves, found = narrow(to + BLOCK), narrow(row + block * size)
        halves[0] = found[0]
        if minimum:
            halves[1] = found[1]
        if eight:
            for column in range(32):
                into[column] = source[start + column]
            return
        for column in range(16):
            into[column] = source[start + column] & uint8(15)
            into[16 + column] = source[start + column] >> uint8(4)
        if fifth:
            for column in range(32):
                bit = (source[header + column // 8] >> uint8(column % 8)) & uint8(1)
                into[column] |= bit << uint8(4)

    return take


def _taken_k(format: str) -> Any:
    """Q4_K to Q6_K: superblocks of eight blocks."""
    fifth = format == "Q5_K"

    @inner
    def runs_of_32(row: int, block: int, to: int) -> None:
        start = row + block // 8 * (176 if fifth else 144)
        source, into, number = octets(start), octets(to), block % 8
        # Six bits each: two bits of the last four scales and minima lie in the first.
        if number < 4:
            scale, least = source[4 + number] & uint8(63), source[8 + number] & uint8(63)
        else:
            low = source[8 + number]
            scale = (low & uint8(15)) | (source[number] >> uint8(6) << uint8(4))
            least = (low >> uint8(4)) | (source[4 + number] >> uint8(6) << uint8(4))
        into[BLOCK], into[BLOCK + 1] = scale, least
        levels = (48 if fifth else 16) + number // 2 * 32
        shift = uint8(4 * (number % 2))
        for column in range(32):
            into[column] = (source[levels + column] >> shift) & uint8(15)
            if fifth:
                into[column] |= ((source[16 + column] >> uint8(number)) & uint8(1)) << uint8(4)

    @inner
    def runs_of_16(row: int, block: int, to: int) -> None:
        start = row + block // 8 * 210
        source, into = octets(start), octets(to)
        number = block % 8
        upper, quarter = number // 4, number % 4
        for index in range(2):
            into[BLOCK + index] = source[192 + 2 * number + index]
        for column in range(32):
            low = (source[64 * upper + 32 * (quarter % 2) + column] >> uint8(4 * (quarter // 2))) & uint8(15)
            high = (source[128 + 32 * upper + column] >> uint8(2 * quarter)) & uint8(3)
            into[column] = low | (high << uint8(4))

    return runs_of_16 if format == "Q6_K" else runs_of_32
