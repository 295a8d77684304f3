"""Programs: every part once, phases in order, whoever does them, however many threads there are."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from kernelmux.contract.device import find_device
from kernelmux_numba.target import target_of
from kernelmux_numba.team import Program, chained, piece

TARGET = target_of(find_device())


def adding(x: torch.Tensor, y: torch.Tensor, each: int):
    """x += y, so many elements a part."""
    words = (x.numel(), each, x, y, x)
    return piece("elementwise:elementwise", TARGET, ("add", ("f32", "f32"), "f32"), words, -(-x.numel() // each))


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(count: int) -> torch.Tensor:
    return torch.zeros(count)


def test_each_part_is_done_once_and_phases_come_in_turn(threads):
    x, one = numbers(1000), torch.ones(1000)
    # Doubling: a phase that began before the last one ended, or a part that was done twice, would show.
    program = Program([[adding(x, one, 7)], *([adding(x, x, 7)] for _ in range(12))], TARGET, (x, one))
    for _ in range(50):
        x.zero_()
        program()
        assert bool((x == 2**12).all())


def test_pieces_of_a_phase_are_done_at_once_and_phases_without_parts_are_none(threads):
    x, y, one = numbers(64), numbers(640), torch.ones(640)
    program = Program([[], [adding(x, one, 8), adding(y, one, 8)], []], TARGET, (x, y, one))
    program()
    assert bool((x == 1).all())
    assert bool((y == 1).all())
    Program([], TARGET)()


def test_a_chain_does_what_its_programs_do_in_turn(threads):
    x, one = numbers(100), torch.ones(100)
    add, double = Program([[adding(x, one, 9)]], TARGET, (x, one)), Program([[adding(x, x, 9)]], TARGET, (x,))
    chained([add, double, add, double])()
    assert bool((x == 6).all())


def test_a_program_keeps_what_it_points_to():
    def made() -> Program:
        x = numbers(1 << 20)
        return Program([[adding(x, x, 4096)]], TARGET, x)

    program = chained([made(), made()])
    others = [numbers(1 << 20) for _ in range(8)]
    program()
    assert not any(bool(other.any()) for other in others)


def test_several_threads_of_a_program_may_run_at_the_same_time(threads):
    results = []

    def work() -> None:
        x, one = numbers(500), torch.ones(500)
        program = Program([[adding(x, one, 11)], [adding(x, x, 11)]], TARGET, (x, one))
        for _ in range(50):
            x.zero_()
            program()
        results.append(bool((x == 2).all()))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 4


def test_threads_that_ask_at_the_same_time_get_one_team():
    """Another one would be forgotten, with its memory, while its threads still look at it."""
    count, before = torch.get_num_threads(), set(threading.enumerate())
    torch.set_num_threads(7)
    x, start = numbers(100), threading.Barrier(8)
    programs = [Program([[adding(x, x, 9)]], TARGET, x) for _ in range(start.parties)]
    torch.set_num_threads(count)
    callers = [threading.Thread(target=lambda each=each: (start.wait(), each())) for each in programs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(set(threading.enumerate()) - before) == 7 - 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(threads):
    x, one = numbers(100), torch.ones(100)
    program = Program([[adding(x, one, 9)]], TARGET, (x, one))
    program()
    child = os.fork()
    if child == 0:
        program()
        os._exit(0 if bool((x == 2).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_numba_is_imported_to_compile_and_never_else(tmp_path):
    code = f"""
import sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_team
x = torch.ones(100)
test_team.Program([[test_team.adding(x, x, 9)]], test_team.TARGET, x)()
print(bool((x == 2).all()), "numba" in sys.modules)
"""
    environment = {**os.environ, "KERNELMUX_CACHE": str(tmp_path)}
    for imported in ("True", "False"):
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        assert found.stdout.split() == ["True", imported]
