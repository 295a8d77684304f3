"""Observers on a card: a trace adds up to the captured step, shadowed steps change nothing, who spins is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kernelmux
from command import TIMEOUT, clean_environment
from kernelmux.debug.nan import NanCheck
from kernelmux.debug.second import Second
from kernelmux.debug.shadow import Shadow
from kernelmux.debug.together import Together
from kernelmux.debug.trace import trace_model
from kernelmux.run.bench import Load, time_model

SPINNING = """
import sys
sys.path[:0] = {path!r}
import torch
import kernelmux_reference, kernelmux_torch
from kernelmux.cli import main
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from wrong.kernel import Right

class Spinning(Right):
    devices = ("cuda",)

    def launch(self, node, tensors):
        for _ in range(100):
            torch.cuda._sleep(2**31)

with registry.isolated(spin=backend(mul_mat=Spinning()), torch=kernelmux_torch, reference=kernelmux_reference):
    sys.argv = ["kernelmux", *{arguments!r}]
    main()
"""


def _decoded(session, prompt: list[int], steps: int):
    sequence = session.open()
    logits = session.feed(sequence, prompt).clone()
    return logits, list(session.decode([sequence], [int(logits.argmax())], steps))


def test_shadowed_and_checked_steps_give_what_captured_ones_give(tiny: Path):
    model = kernelmux.load(tiny)
    plan = model.plan(device="cuda")
    plain = _decoded(model.session(plan, 128), [1, 2, 3, 4, 5], 40)
    session = model.session(plan, 128)
    shadow = Shadow(session, Second.parse("reference:1/4"))
    with session.watched(Together([shadow, NanCheck(session)])):
        looked = _decoded(session, [1, 2, 3, 4, 5], 40)
    assert looked[0].equal(plain[0])
    assert looked[1] == plain[1]
    assert (shadow.sampled, shadow.over) == (11, [])
    assert {each.node for each in shadow.found} >= {step.node.name for step in session.plan.schedule(1, 1).steps}


@pytest.mark.model
def test_the_nodes_of_a_trace_add_up_to_the_step(smollm2: Path):
    model = kernelmux.load(smollm2)
    for step in trace_model(model, model.plan(device="cuda"), 512, 64, 1).steps:
        assert 0.9 <= (step.us + (step.between or 0.0)) / step.step.median <= 1.1, str(step)


@pytest.mark.model
def test_a_shadow_of_a_hundredth_costs_a_twentieth_at_most(smollm2: Path):
    model = kernelmux.load(smollm2)
    plan, load = model.plan(device="cuda"), Load(decode=400)
    plain = time_model(model, plan, load).decode.median

    def looking(session):
        return session.watched(Shadow(session, Second.parse("torch")))

    assert time_model(model, plan, load, looking=looking).decode.median <= 1.05 * plain


def test_a_kernel_that_spins_on_the_card_is_named(tiny: Path, tmp_path: Path):
    policy = tmp_path / "spin.toml"
    policy.write_text('[[rule]]\nnode = "blk.1.ffn_down"\nuse = "spin"\n[defaults]\nuse = ["torch", "reference"]\n')
    asked = ["run", str(tiny), "-p", "hello", "--device", "cuda", "--policy", str(policy), "--watchdog", "3"]
    (tmp_path / "spinning.py").write_text(SPINNING.format(path=sys.path, arguments=asked))
    spun = subprocess.run(
        [sys.executable, "-c", "import spinning"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=clean_environment(),
    )
    assert spun.returncode == 75, spun.stderr
    assert "spin:kernel at blk.1.ffn_down (mul_mat" in spun.stderr
