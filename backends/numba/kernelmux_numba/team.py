"""Programs of compiled functions, and the team of threads that runs them.

Enters: phases, each some functions of which every part may be done at the same time. Leaves: a launch; or one of
several, which runs their phases one after the other without Python between them, and to the bit the same results.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any

import torch

from kernelmux_numba.loaded import address_of
from kernelmux_numba.target import Target

# Where a team's words lie: each on a cache line of its own.
CURSOR, DONE, PROGRAM, SLEEPERS, LOCK, WAKE, CALLS, WORDS = 0, 8, 16, 24, 32, 48, 64, 72
OVER = 0xFFFFF
"""The phase of a cursor whose run is over; more than any program has, and than any phase has parts."""
SYSTEM = ("pthread_mutex_lock", "pthread_mutex_unlock", "pthread_cond_wait", "pthread_cond_broadcast")
"""What compiled code calls, by its address in a team's words: it need not be found by name."""
PARTS_A_THREAD = 8
"""Parts of a phase for each thread, at most: so that whoever is late has little left to do."""
FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True)
class Piece:
    """A compiled function, the words that it is given, and into how many parts its work is cut."""

    function: int
    words: torch.Tensor
    parts: int


def piece(
    made: str, target: Target, constants: Sequence[Any], words: Sequence[torch.Tensor | float | None], parts: int
) -> Piece:
    """The function that `module:function` of `code` makes with these constants, and the words that it is given.

    Of a tensor a word is its address, 0 where there is none; a float is given by its bits.
    """
    given = torch.tensor([_word(value) for value in words], dtype=torch.int64)
    return Piece(address_of(made, target, *constants), given, parts)


def _word(value: torch.Tensor | float | None) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        return int(bits)
    return int(value or 0)


def shares(count: int, least: int = 1) -> tuple[int, int]:
    """How many of `count` things a part has, `least` or more, and how many parts there are."""
    each = max(least, -(-count // (PARTS_A_THREAD * torch.get_num_threads())))
    return each, -(-count // each)


Phase = Sequence[Piece]
"""Pieces whose parts depend on none of each other's."""


class Team:
    """A caller and the threads that help it; these are this process's, not those of one that it was forked to."""

    def __init__(self, target: Target, threads: int) -> None:
        self._memory = torch.zeros(WORDS + 8, dtype=torch.int64)
        start = self._memory.data_ptr()
        self.address = start + -start % 64
        system = ctypes.CDLL(None)
        for number, name in enumerate(SYSTEM):
            address = ctypes.cast(getattr(system, name), ctypes.c_void_p).value
            ctypes.c_int64.from_address(self.address + 8 * (CALLS + number)).value = address
        for name, place in (("pthread_mutex_init", LOCK), ("pthread_cond_init", WAKE)):
            getattr(system, name)(ctypes.c_void_p(self.address + 8 * place), None)
        ctypes.c_int64.from_address(self.address + 8 * CURSOR).value = OVER << 20
        self._run = FUNCTION(address_of("threads:runner", target))
        self._one_at_a_time = Lock()
        help_all = FUNCTION(address_of("threads:helper", target))
        for number in range(1, threads):
            Thread(target=help_all, args=(self.address, 0), name=f"numba {number}", daemon=True).start()

    def run(self, program: int) -> None:
        with self._one_at_a_time:
            self._run(self.address, program)


_TEAMS: dict[tuple[Target, int, int], Team] = {}
"""By target, threads and process; as long as the process, for a team's threads look at its memory all along."""
_MAKING = Lock()


def _team(target: Target, threads: int) -> Team:
    """This process's team of so many threads: one, whoever asks for it at the same time."""
    key = target, threads, os.getpid()
    if key not in _TEAMS:
        with _MAKING:
            if key not in _TEAMS:
                _TEAMS[key] = Team(target, threads)
    return _TEAMS[key]


class Program:
    """A launch of phases one after the other, by a team of as many threads as torch has when it is made."""

    def __init__(self, phases: Sequence[Phase], target: Target, held: object = None) -> None:
        """`held` is what the words point to: kept as long as the program is."""
        self.phases, self.target, self._held = phases, target, held
        self._threads = torch.get_num_threads()
        self._words = _laid(phases)
        self._address = self._words.data_ptr()

    def __call__(self) -> None:
        _team(self.target, self._threads).run(self._address)


def chained(programs: Sequence[Program]) -> Program:
    """One launch of several."""
    return Program([phase for program in programs for phase in program.phases], programs[0].target, programs)


def _laid(phases: Sequence[Phase]) -> torch.Tensor:
    """A program's words: how many phases; of each its parts, and where its pieces are; of each piece where its parts
    end, its function and the address of its words."""
    head: list[int] = [len(phases)]
    pieces: list[int] = []
    start = 1 + 2 * len(phases)
    for phase in phases:
        end = 0
        head += [sum(piece.parts for piece in phase), start + len(pieces)]
        for piece in phase:
            end += piece.parts
            pieces += [end, piece.function, piece.words.data_ptr()]
    return torch.tensor(head + pieces, dtype=torch.int64)
