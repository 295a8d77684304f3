"""The threads that share a program's parts: one that runs it, and any number that help.

A program is phases, each of some parts that may be done at the same time by whoever is free. Nobody waits for a thread:
a phase ends when its parts are done, and who does the last one opens the next phase. So a thread that the system has
taken the processor from holds up no more than the part in its hands.

One word, the cursor, says which run this is, which phase is open and how many of its parts nobody has taken yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kernelmux_numba.code.memory import WORD, at_index, inner, instructions, word
from kernelmux_numba.target import Target
from kernelmux_numba.team import CALLS, CURSOR, DONE, LOCK, OVER, PROGRAM, SLEEPERS, SYSTEM, WAKE

PAUSES = 600
"""How often a thread looks for work before it sleeps: some 20 to 30 microseconds, longer than phases last."""


def _atomic(emit: Callable[[ir.IRBuilder, ir.Value, Any], ir.Value], operands: int) -> Any:
    """An operation on the word of that index behind an address."""

    def lay(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, *given: ir.Value) -> ir.Value:
        return emit(builder, at_index(builder, base, index), given)

    return instructions(lay, 2 + operands, types.int64)


def _store(builder: ir.IRBuilder, place: ir.Value, given: Any) -> ir.Value:
    builder.store_atomic(given[0], place, "seq_cst", 8)
    return given[0]


def _replace(builder: ir.IRBuilder, place: ir.Value, given: Any) -> ir.Value:
    done = builder.cmpxchg(place, given[0], given[1], "seq_cst", "seq_cst")
    return builder.zext(builder.extract_value(done, 1), WORD)


read = _atomic(lambda builder, place, given: builder.load_atomic(place, "seq_cst", 8), 0)
"""read(base, index)."""
write = _atomic(_store, 1)
"""write(base, index, value)."""
add = _atomic(lambda builder, place, given: builder.atomic_rmw("add", place, given[0], "seq_cst"), 1)
"""add(base, index, value): what was there before."""
replace = _atomic(_replace, 2)
"""replace(base, index, expected, value): 1 where it was as expected, and is that value now."""


def _system(name: str, count: int) -> Any:
    """A function of the system's threads library (POSIX): given the team, and as many addresses."""

    def lay(builder: ir.IRBuilder, team: ir.Value, *given: ir.Value) -> None:
        kind = ir.FunctionType(ir.IntType(32), [WORD] * count)
        function = builder.load(at_index(builder, team, WORD(CALLS + SYSTEM.index(name))))
        builder.call(builder.inttoptr(function, kind.as_pointer()), given)

    return instructions(lay, 1 + count)


lock, unlock = _system("pthread_mutex_lock", 1), _system("pthread_mutex_unlock", 1)
sleep, wake_all = _system("pthread_cond_wait", 2), _system("pthread_cond_broadcast", 1)


def _called(builder: ir.IRBuilder, function: ir.Value, arguments: ir.Value, part: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [WORD, WORD])
    builder.call(builder.inttoptr(function, kind.as_pointer()), [arguments, part])


call = instructions(_called, 3)
"""call(function, arguments, part): calls the compiled function at an address."""


def _pause(target: Target) -> Any:
    """Tells the processor that this thread only waits."""

    def lay(builder: ir.IRBuilder) -> None:
        if target.x86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])

    return instructions(lay, 0)


@inner
def open_phase(team: int, program: int, run: int, phase: int) -> None:
    """Opens the first phase from that one on that has parts, or ends the run; wakes who sleeps."""
    phases = word(program, 0)
    while phase < phases and word(program, 1 + 2 * phase) == 0:
        phase += 1
    parts = word(program, 1 + 2 * phase) if phase < phases else 0
    shown = phase if phase < phases else OVER
    write(team, CURSOR, (run << 40) | (shown << 20) | parts)
    if read(team, SLEEPERS) > 0:
        lock(team, team + 8 * LOCK)
        wake_all(team, team + 8 * WAKE)
        unlock(team, team + 8 * LOCK)


@inner
def do_part(team: int, cursor: int) -> None:
    """Does the part that was taken when the cursor stood so; who does a phase's last one opens the next."""
    program = word(team, PROGRAM)
    phase, part = (cursor >> 20) & OVER, (cursor & OVER) - 1
    head = program + 8 * (1 + 2 * phase)
    piece = program + 8 * word(head, 1)
    before = 0
    while part >= word(piece, 0):
        before = word(piece, 0)
        piece += 24
    parts = word(head, 0)
    call(word(piece, 1), word(piece, 2), part - before)
    # From here on the run may be over, and the program's memory another's, unless this was the phase's last part.
    if add(team, DONE, 1) + 1 == parts:
        write(team, DONE, 0)
        open_phase(team, program, (cursor >> 40) & 0xFFFFFF, phase + 1)


def _waiting(target: Target) -> Any:
    pause = _pause(target)

    @inner
    def wait(team: int, cursor: int) -> None:
        """Until the cursor is another: at first awake."""
        for _ in range(PAUSES):
            if read(team, CURSOR) != cursor:
                return
            pause()
        lock(team, team + 8 * LOCK)
        add(team, SLEEPERS, 1)
        while read(team, CURSOR) == cursor:
            sleep(team, team + 8 * WAKE, team + 8 * LOCK)
        add(team, SLEEPERS, -1)
        unlock(team, team + 8 * LOCK)

    return wait


def helper(target: Target) -> Callable[[int, int], None]:
    """A thread that helps with every run of a team, as long as the process lives."""
    wait = _waiting(target)

    def help_all(team: int, unused: int) -> None:
        while True:
            cursor = read(team, CURSOR)
            if cursor & OVER == 0:
                wait(team, cursor)
            elif replace(team, CURSOR, cursor, cursor - 1):
                do_part(team, cursor)

    return help_all


def runner(target: Target) -> Callable[[int, int], None]:
    """Runs a program, with the help of the team's threads; one run of a team at a time."""
    wait = _waiting(target)

    def run(team: int, program: int) -> None:
        number = ((read(team, CURSOR) >> 40) + 1) & 0xFFFFFF
        write(team, PROGRAM, program)
        open_phase(team, program, number, 0)
        while True:
            cursor = read(team, CURSOR)
            if (cursor >> 20) & OVER == OVER:
                return
            if cursor & OVER == 0:
                wait(team, cursor)
            elif replace(team, CURSOR, cursor, cursor - 1):
                do_part(team, cursor)

    return run
