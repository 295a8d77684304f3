"""Observers on a card: a trace adds up to the captured step, shadowed steps change nothing, who spins is named."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernelmux
import kernelmux_reference
import kernelmux_torch
from command import TIMEOUT, clean_environment
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.debug.bisect import bisect
from kernelmux.debug.nan import NanCheck
from kernelmux.debug.second import Second
from kernelmux.debug.shadow import Shadow
from kernelmux.debug.together import Together
from kernelmux.debug.trace import trace_model
from kernelmux.policy.policy import parse_policy
from kernelmux.run.bench import prepared_session, random_ids, time_decoding
from wrong.kernel import Right

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


@pytest.mark.parametrize("second", ["reference", "torch"])
def test_shadowed_and_checked_steps_give_what_captured_ones_give(tiny: Path, second: str):
    model = kernelmux.load(tiny)
    plan = model.plan(device="cuda")
    plain = _decoded(model.session(plan, 128), [1, 2, 3, 4, 5], 40)
    session = model.session(plan, 128)
    shadow = Shadow(session, Second.parse(f"{second}:1/4"))
    with session.watched(Together([shadow, NanCheck(session)])):
        looked = _decoded(session, [1, 2, 3, 4, 5], 40)
    assert looked[0].equal(plain[0])
    assert looked[1] == plain[1]
    assert (shadow.sampled, shadow.over) == (11, [])
    seen = {each.node for each in shadow.found}
    assert seen | shadow.missing.keys() >= {step.node.name for step in session.plan.schedule(1, 1).steps}
    assert second != "reference" or not shadow.missing


def test_a_graph_of_both_kernels_launches_tells_what_single_launches_tell(tiny: Path):
    """The first of the sampled steps is made launch by launch, those after it are replays."""
    model = kernelmux.load(tiny)
    plan = model.plan(device="cuda")
    plain = _decoded(model.session(plan, 128), [1, 2, 3, 4, 5], 40)
    session, found = model.session(plan, 128), []
    for observer in (kind(session, Second.parse("torch:1/4")) for kind in (Shadow, _Single)):
        with session.watched(observer):
            looked = _decoded(session, [1, 2, 3, 4, 5], 40)
        assert looked[1] == plain[1]
        found.append({(each.node, each.kernel): (each.launches, each.worst, each.mean) for each in observer.found})
    assert found[0].keys() == found[1].keys()
    for node, told in found[0].items():
        assert told == pytest.approx(found[1][node], rel=0.5, abs=1e-12), node


class _Single(Shadow):
    """Looks at each launch by itself."""

    def recorded(self, walk):
        return None


@pytest.mark.model
def test_the_nodes_of_a_trace_add_up_to_the_step(smollm2: Path):
    model = kernelmux.load(smollm2)
    for step in trace_model(model, model.plan(device="cuda"), 512, 64, 1).steps:
        assert 0.9 <= (step.us + (step.between or 0.0)) / step.step.median <= 1.1, str(step)


@pytest.mark.model
@pytest.mark.parametrize("second", ["torch", "triton", "cupy"])
def test_a_shadow_of_a_hundredth_costs_a_twentieth_at_most(smollm2: Path, second: str):
    """In turns with the same steps without it: the card's clock is no constant."""
    model = kernelmux.load(smollm2)
    session = prepared_session(model, model.plan(device="cuda"), 1024, 1)
    sequence = session.open()
    session.feed(sequence, random_ids(model, 512, 0))
    shadow = Shadow(session, Second.parse(second))

    def timed() -> float:
        return time_decoding(session, [sequence], 400, torch.cuda.synchronize)

    def looked() -> float:
        with session.watched(shadow):
            return timed()

    # The first sampled step is made launch by launch, the second is recorded.
    timed(), looked()
    turns = [(timed(), looked()) for _ in range(7)]
    plain, shadowed = (statistics.median(each) for each in zip(*turns, strict=True))
    assert shadow.found
    assert [str(each) for each in shadow.over] == []
    assert shadowed <= 1.05 * plain


def test_a_fault_that_only_replays_show_is_named(tiny: Path):
    class Odd(Right):
        dtype, launches, devices = torch.float32, 2, ("cuda",)

        def launch(self, node, tensors):
            (x,), (y,), (weight,) = tensors.inputs, tensors.outputs, tensors.packed
            torch.matmul(x, weight.T, out=y)
            if node.name == "blk.1.ffn_down" and torch.cuda.is_current_stream_capturing():
                y.mul_(1.5)

    policy = parse_policy('fuse = false\n[defaults]\nuse = ["odd", "torch"]\n', "p.toml")
    with registry.isolated(odd=backend(mul_mat=Odd()), torch=kernelmux_torch, reference=kernelmux_reference):
        model = kernelmux.load(tiny)
        found = bisect(model, model.plan(policy, device="cuda"), list(range(3, 27)), 4)
    assert found.replayed
    assert [(suspect.node, suspect.rows) for suspect in found.blamed] == [("blk.1.ffn_down", (1, 1))]


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
