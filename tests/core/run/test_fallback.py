"""A kernel that raises in a walk: replaced without losing a sequence where the policy says so, else named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import kernelmux
import kernelmux_reference
from fake_backend import CPU, FakeKernel, chain, compute, plan_for, silu_graph, whole_backend
from fake_platform import Npu
from kernelmux.conformance.testing import backend
from kernelmux.contract import device as devices
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import LaunchError
from kernelmux.graph.ops import CORE_OPS, OPS, Fused
from kernelmux.plan.lock import read_lock, write_lock
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import Model
from kernelmux.run.replaced import told
from kernelmux.run.sampling import Sampling
from kernelmux.run.session import Feed
from kernelmux.run.walker import Walker

NEXT = '[defaults]\nuse = ["flaky"]\non_error = "next"\n'
STICKY = "tile memory is gone"
PLAIN_OPS = [op for op in CORE_OPS if not isinstance(OPS[op], Fused)]


class Flaky(FakeKernel):
    """Computes, but at its n-th launch (from 1) spoils what it writes and raises."""

    def __init__(self, nth, name="f32", error=None, **declared):
        super().__init__(name, work=self._launch, **declared)
        self.nth, self.error, self.count = nth, error or RuntimeError("out of tiles"), 0

    def _launch(self, node, tensors):
        self.count += 1
        if self.count != self.nth:
            compute(node, tensors)
            return
        if node.op == "copy":
            compute(node, tensors)
            slots = tensors.inputs[2].long()
            for cache in tensors.outputs:
                cache.flatten(0, 1)[slots] = float("nan")
        else:
            for planes in tensors.outputs:
                planes.fill_(float("nan"))
        raise self.error


class Unbindable(FakeKernel):
    def bind(self, node, tensors, stream):
        raise RuntimeError("does not compile")


class Unpackable(FakeKernel):
    def prepare(self, weights, device):
        raise RuntimeError("does not pack")


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


def prompt(length, seed=0):
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def dealt(session, steps=5):
    """Greedy ids of two sequences in one batch: a prompt, then a second one beside the first's decoding, then both."""
    sequences, ids = [session.open() for _ in range(2)], [[], []]
    last = session.step([Feed(sequences[0], prompt(9, 1))])
    ids[0].append(int(last[0].argmax()))
    both = session.step([Feed(sequences[1], prompt(6, 2)), Feed(sequences[0], ids[0][-1:])])
    for _ in range(steps):
        ids[1].append(int(both[0].argmax()))
        ids[0].append(int(both[1].argmax()))
        both = session.step([Feed(sequences[1], ids[1][-1:]), Feed(sequences[0], ids[0][-1:])])
    return ids


def run(model, policy=NEXT, **backends):
    """The ids, and the session that they came from; `flaky` goes first, the reference after it."""
    with registry.isolated(**backends, reference=kernelmux_reference):
        session = model.session(model.plan(parse_policy(policy, "p.toml"), max_rows=16), 64, sequences=2)
        return dealt(session), session


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[int]]:
    """What comes out where no backend is flaky."""
    return run(model, '[defaults]\nuse = ["reference"]\n')[0]


# Two layers: launches of one op in the first prompt, then in the second, then two a decoding step.
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 8, 14])
@pytest.mark.parametrize("op", ["attention", "copy", "rope", "mul"])
def test_at_whatever_launch_a_kernel_raises_the_ids_are_those_without_it(model: Model, expected, op: str, nth: int):
    kernel = Flaky(nth)
    ids, session = run(model, f"fuse = false\n{NEXT}", flaky=backend(**{op: kernel}))
    assert kernel.count >= nth
    assert ids == expected
    ((node, name),) = session.walker.plan.banned
    assert name == "flaky:f32"
    # The other layer's node keeps its kernel: only the node that raised has lost it.
    chosen = {s.node.name: s.choice for s in session.walker.plan.schedule(1, 1).steps if s.node.op == op}
    assert {n: c.name for n, c in chosen.items()} == {
        n: "reference:f32" if n == node else "flaky:f32" for n in (f"blk.{i}.{_NAMES[op]}" for i in range(2))
    }
    loser = next(loser for loser in chosen[node].rejected if loser.kernel == "flaky:f32")
    assert (loser.kind, loser.reason) == ("raised", "it raised in a walk")


_NAMES = {"attention": "attention", "copy": "copy", "rope": "rope", "mul": "ffn_mul"}


@pytest.mark.parametrize("nth", [1, 6, 11])
def test_kernels_that_raise_one_after_another_are_all_replaced(model: Model, expected, nth: int):
    ops = {node.op for node in model.graph.ops} & {*PLAIN_OPS} - {"embed"}
    flaky = {op: Flaky(nth) for op in sorted(ops)}
    ids, session = run(model, flaky=backend(**flaky))
    assert ids == expected
    assert len(session.walker.plan.banned) == len(flaky)


def test_a_kernel_that_always_raises_is_replaced_at_every_node(model: Model, expected):
    def fails(node, tensors):
        raise ValueError("never worked")

    ids, session = run(model, flaky=backend(attention=FakeKernel(work=fails)))
    assert ids == expected
    assert session.walker.plan.banned == {(f"blk.{layer}.attention", "flaky:f32") for layer in range(2)}


@pytest.mark.parametrize("kernel", [Unbindable("one"), Unpackable("two", packed_bytes=64)], ids=["bind", "pack"])
def test_a_kernel_that_cannot_be_bound_is_replaced_too(model: Model, expected, kernel: FakeKernel):
    ids, session = run(model, flaky=backend(mul_mat=kernel, rms_norm=kernel))
    assert ids == expected
    assert session.walker.plan.banned


@pytest.mark.parametrize("where", ["bind", "prepare", "launch"])
def test_a_kernel_that_exits_has_raised_like_any_other(model: Model, expected, where: str):
    def exits(*told):
        raise SystemExit(0)

    # A form of its own: one that a session of another test still holds would not be made again.
    kernel = FakeKernel(work=exits if where == "launch" else compute, packed_bytes=64, packed=f"exits in {where}")
    if where != "launch":
        setattr(kernel, where, exits)
    ids, session = run(model, flaky=backend(rms_norm=kernel))
    assert ids == expected
    assert session.replaced[0].error.startswith("SystemExit: 0 (")


def test_ctrl_c_while_a_kernel_is_launched_is_not_the_kernels_error():
    with pytest.raises(KeyboardInterrupt):
        walk(NEXT, flaky=backend(silu=Flaky(1, error=KeyboardInterrupt())), good=whole_backend())


def test_an_answer_survives_a_kernel_that_cannot_pack(model: Model):
    """Weights are packed before the first step, under the progress bar: that is no reason to stop."""
    with registry.isolated(flaky=backend(mul_mat=Unpackable("three", packed_bytes=64)), reference=kernelmux_reference):
        free = model.generate("hello", model.plan(use=["*=reference"]), max_tokens=4)
        kept = model.generate("hello", model.plan(parse_policy(NEXT, "p.toml")), max_tokens=4)
        assert ("".join(kept), kept.ids) == ("".join(free), free.ids)


@pytest.mark.parametrize("nth", [1, 4, 9, 12])
def test_a_drawn_decode_survives_a_kernel_that_raises_with_no_token_drawn_twice(model: Model, nth: int):
    def drawn(policy, **backends):
        with registry.isolated(**backends, reference=kernelmux_reference):
            session = model.session(model.plan(parse_policy(policy, "p.toml"), max_rows=16), 64, sequences=2)
            hot = Sampling(temperature=1.0, repetition_penalty=1.3, seed=1)
            sequences = [session.open() for _ in range(2)]
            return list(session.decode(sequences, [1, 2], 6, hot)), session

    kernel = Flaky(nth)
    found, session = drawn(f"fuse = false\n{NEXT}", flaky=backend(rope=kernel))
    assert kernel.count >= nth
    assert len(session.replaced) == 1
    assert found == drawn('[defaults]\nuse = ["reference"]\n')[0]


def test_a_session_tells_what_it_replaced_and_which_plan_it_walks(model: Model):
    def fails(node, tensors):
        raise ValueError("never\n  worked")

    with registry.isolated(flaky=backend(attention=FakeKernel(work=fails)), reference=kernelmux_reference):
        plan = model.plan(parse_policy(NEXT, "p.toml"), max_rows=16)
        session = model.session(plan, 64, sequences=2)
        assert (session.replaced, session.plan) == ([], plan)
        dealt(session)
    assert [(each.node, each.kernel, each.instead) for each in session.replaced] == [
        (f"blk.{layer}.attention", "flaky:f32", ("reference:f32",)) for layer in range(2)
    ]
    assert {re.sub(r":\d+\)", ":1)", each.error) for each in session.replaced} == {
        "ValueError: never worked (fake_backend.py:1)"
    }
    (line,) = told(session.replaced)
    assert line.startswith("flaky:f32 raised at blk.0..1.attention: ValueError: never worked (")
    assert line.endswith("); reference:f32 runs instead")
    assert session.plan.fingerprint != plan.fingerprint


def test_of_a_replaced_fused_node_the_kernels_of_its_parts_are_told(model: Model):
    policy = f'[[rule]]\nop = "gate_up_swiglu"\nuse = "flaky"\n\n{NEXT}'
    plain = _plain()
    others = {"other": backend(silu=plain.pop("silu")), "plain": backend(**plain)}
    with registry.isolated(flaky=backend(gate_up_swiglu=Flaky(2)), **others):
        session = model.session(model.plan(parse_policy(policy, "p.toml"), max_rows=16), 64, sequences=2)
        dealt(session)
    ((kernel, instead),) = [(each.kernel, each.instead) for each in session.replaced]
    assert (kernel, instead) == ("flaky:f32", ("plain:f32", "other:f32"))


@pytest.mark.parametrize("nth", [1, 3])
def test_a_fused_kernel_that_raises_gives_way_to_the_parts(model: Model, expected, nth: int):
    kernel = Flaky(nth)
    whole = {op: FakeKernel(work=compute) for op in ("mul_mat", "silu", "mul")}
    ids, session = run(model, flaky=backend(**whole, gate_up_swiglu=kernel))
    assert ids == expected
    ops = [step.node.op for step in session.walker.plan.schedule(1, 1).steps]
    assert ops.count("gate_up_swiglu") == ops.count("silu") == 1


def test_a_fused_kernel_that_a_rule_names_gives_way_to_the_parts_too(model: Model, expected):
    policy = f'[[rule]]\nop = "gate_up_swiglu"\nuse = "flaky"\n\n{NEXT}'
    with registry.isolated(flaky=backend(gate_up_swiglu=Flaky(2)), plain=backend(**_plain())):
        session = model.session(model.plan(parse_policy(policy, "p.toml"), max_rows=16), 64, sequences=2)
        assert dealt(session) == expected


def _plain():
    return {op: FakeKernel(work=compute) for op in PLAIN_OPS}


# Who decides: the rule that chose the kernel, then the defaults.

FIRST = '[[rule]]\nop = "silu"\nuse = "flaky"\n'


def walk(policy, graph=None, device=CPU, **backends):
    """One walk by a session's rule: again without a kernel that raised, where the policy says so."""
    with registry.isolated(**backends) as found:
        plan = make_plan(graph or silu_graph(), parse_policy(policy, "p.toml"), found, device, 8)
    walker = Walker(plan, PackedWeights({}, device), {"x": torch.ones(8, 8)})
    while True:
        try:
            walker.bind(m=3)()
        except LaunchError as error:
            walker = walker.without(error)
        else:
            return walker.plan


@pytest.mark.parametrize(
    ("policy", "goes_on"),
    [
        ("", False),
        (FIRST, False),
        (f'{FIRST}on_error = "next"\n', True),
        (f'{FIRST}on_error = "error"\n{NEXT}', False),
        (f'{FIRST}on_error = "next"\n[defaults]\non_error = "error"\n', True),
        (f"{FIRST}{NEXT}", True),
        (NEXT, True),
        ('[[rule]]\nop = "add"\nuse = "flaky"\non_error = "next"\n', False),
    ],
    ids=["nothing", "a rule", "next", "error before next", "next before error", "defaults", "no rule", "another rule"],
)
def test_a_rules_on_error_outranks_the_defaults(policy, goes_on):
    backends = {"flaky": backend(silu=Flaky(1)), "good": whole_backend()}
    if goes_on:
        assert walk(policy, **backends).schedule(1, 1).steps[0].choice.name == "good:f32"
    else:
        with pytest.raises(LaunchError, match="out of tiles"):
            walk(policy, **backends)


def test_a_fused_node_goes_on_where_its_parts_would(model: Model, expected):
    """The rule is about mul_mat; the kernel that stands for two of them was chosen by it."""
    policy = '[[rule]]\nop = "mul_mat"\nuse = "flaky"\non_error = "next"\n\n[defaults]\nuse = ["flaky"]\n'
    ids, _ = run(model, policy, flaky=backend(**_plain(), gate_up_swiglu=Flaky(2)))
    assert ids == expected


# Where it stops.


def test_the_error_names_node_kernel_shapes_and_device():
    with pytest.raises(LaunchError) as caught:
        walk("", chain("silu", "add", "silu"), flaky=whole_backend(add=Flaky(1)))
    for part in ("flaky:f32", "n1", "(add, step 2 of 3)", "cpu", "n0 [3, 8] f32", "n1 [3, 8] f32", "RuntimeError: out"):
        assert part in str(caught.value)
    assert re.search(r"RuntimeError: out of tiles \(fake_backend\.py:\d+\)$", str(caught.value))
    assert (caught.value.node, caught.value.kernel, caught.value.sticky) == ("n1", "flaky:f32", False)


def test_an_error_of_several_lines_is_told_in_one():
    with pytest.raises(LaunchError) as caught:
        walk("", flaky=backend(silu=Flaky(1, error=RuntimeError("does not compile:\n  line 3\n\n  line 4"))))
    assert "RuntimeError: does not compile: line 3 line 4 (fake_backend.py:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_there_is_no_next_kernel_the_error_is_the_original_one():
    error = ValueError("the only one")
    with pytest.raises(LaunchError, match="the only one") as caught:
        walk(NEXT, flaky=backend(silu=Flaky(1, error=error)))
    assert (caught.value.node, caught.value.kernel) == ("y", "flaky:f32")


def test_a_rule_that_says_no_other_may_take_it_has_no_next_kernel():
    policy = f'{FIRST}on_unsupported = "error"\non_error = "next"\n'
    with pytest.raises(LaunchError, match="out of tiles"):
        walk(policy, flaky=backend(silu=Flaky(1)), good=whole_backend())


def test_a_fallback_that_breaks_a_requirement_is_no_fallback():
    policy = f'[[require]]\nop = "silu"\nkernel = "flaky"\n\n{NEXT}'
    with pytest.raises(LaunchError, match="out of tiles"):
        walk(policy, flaky=backend(silu=Flaky(1)), good=whole_backend())


@pytest.mark.parametrize(("kind", "sticky"), [("npu", True), ("cpu", False)])
def test_a_fault_of_the_device_is_not_tried_again_and_names_the_suspects(monkeypatch, kind, sticky):
    """Which words say so is the kind's own."""
    monkeypatch.setattr(devices, "PLATFORMS", dict(devices.PLATFORMS))
    devices.add_platform(Npu())
    good = whole_backend()
    graph = chain("silu", "add", "mul", "silu", "add", "mul")
    flaky = whole_backend(mul=Flaky(2, error=RuntimeError(STICKY)))
    device = devices.find_device(kind)
    if not sticky:
        chosen = walk(NEXT, graph, device, flaky=flaky, good=good).schedule(1, 1).steps
        assert [step.choice.name for step in chosen] == ["flaky:f32"] * 5 + ["good:f32"]
        return
    with pytest.raises(LaunchError) as caught:
        walk(NEXT, graph, device, flaky=flaky, good=good)
    assert caught.value.sticky
    assert f"on {device.torch}, with" in str(caught.value)
    message = str(caught.value)
    assert "The device is lost to this process" in message
    suspects = message.partition("latest first: ")[2]
    assert suspects.startswith("n5 (flaky:f32), n4 (flaky:f32), ")
    assert "n0" not in suspects


def test_a_locked_plan_that_goes_on_keeps_its_other_choices(tmp_path: Path):
    graph, policy = chain("silu", "add", "mul"), f'[[rule]]\nop = "mul"\nuse = "other"\n\n{NEXT}'
    kernel = Flaky(1)
    with registry.isolated(flaky=whole_backend(add=kernel), good=whole_backend(), other=whole_backend()) as found:
        plan = plan_for(graph, found, policy)
        write_lock(plan, tmp_path / "p.json")
        locked = read_lock(tmp_path / "p.json", graph, found, CPU)
        after = locked.without("n1", "flaky:f32")
    chosen = {step.node.name: step.choice.name for step in after.schedule(1, 1).steps}
    assert chosen == {"n0": "flaky:f32", "n1": "good:f32", "n2": "other:f32"}
