"""Products of single rows with the panels of those experts that they were given to."""

from __future__ import annotations

from collections.abc import Callable

from numba import int64

from kernelmux_numba.code.memory import integers, word, words_at
from kernelmux_numba.code.products import AT_ONCE, BIAS, OUTPUTS, PANEL_BYTES, PANELS, Y, one_row
from kernelmux_numba.code.vectors import stack
from kernelmux_numba.packing import Packing
from kernelmux_numba.target import Target

# Beside the words of a product, whose outputs are one expert's; AT_ONCE counts panels of all places.
IDS, EACH, PLACES, SHARING = range(AT_ONCE + 1, AT_ONCE + 5)
"""The expert of each place; panels of an expert; places, which are rows of results; places that share a row of x."""


def quantised(target: Target, packing: Packing) -> Callable[[int, int], None]:
    """Products with experts' weights packed so, of activations that are integers of 16 bits."""
    by_one, memory = one_row(target, packing), stack(8 * AT_ONCE)

    def product(words: int, part: int) -> None:
        at = memory()
        own, ids = words_at(at), integers(word(words, IDS))
        for index in range(AT_ONCE):
            own[index] = word(words, index)
        each, outputs, bias = word(words, EACH), word(words, OUTPUTS), word(words, BIAS)
        first = part * word(words, AT_ONCE)
        last = min(first + word(words, AT_ONCE), word(words, PLACES) * each)
        while first < last:
            place = first // each
            expert = int64(ids[place])
            own[PANELS] = word(words, PANELS) + expert * each * word(words, PANEL_BYTES)
            own[Y] = word(words, Y) + 4 * place * outputs
            if bias:
                own[BIAS] = bias + 4 * expert * outputs
            end = min(last, (place + 1) * each)
            for panel in range(first - place * each, end - place * each):
                by_one(at, panel, place // word(words, SHARING))
            first = end

    return product
