"""torch's profiler shows each launch under its node's and its kernel's name."""

import torch

import kernelmux
from command import call_command
from kernelmux.debug.annotate import Annotate


def test_the_profiler_shows_nodes_and_kernels(tiny):
    model = kernelmux.load(tiny)
    session = model.session(model.plan(use=["*=reference"]), 64)
    sequence = session.open()
    plain = session.feed(sequence, [1, 2, 3]).clone()
    session.close(sequence)
    with session.watched(Annotate()), torch.profiler.profile() as profiler:
        assert session.feed(session.open(), [1, 2, 3]).equal(plain)
    names = {event.name for event in profiler.events()}
    steps = session.plan.schedule(3, 1).steps
    assert {f"{step.node.name} {step.node.op} {step.choice.name}" for step in steps} <= names


def test_a_run_and_a_bench_take_it(tiny):
    assert call_command("run", tiny, "-p", "hello", "--max-tokens", 2, "--annotate").code == 0
    asked = ("--prompt", 4, "--context", 4, "--decode", 2, "--max-rows", 4)
    assert call_command("bench", "model", tiny, *asked, "--annotate").code == 0
