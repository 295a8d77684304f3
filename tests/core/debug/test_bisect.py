"""Planted faults of many kinds in a backend that is right but for them: each is named, by node and rows, alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kernelmux
import kernelmux_reference
from fake_backend import FakeKernel, compute, whole_backend
from kernelmux.contract import registry
from kernelmux.contract.kernel import Chain
from kernelmux.debug.bisect import Verdict, bisect, without
from kernelmux.errors import ModelError
from kernelmux.graph.ops import OPS
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import Model

POLICY = '[defaults]\nuse = ["faulty"]\n'
PLAIN = f"fuse = false\n{POLICY}"
PROMPT, DECODED = 24, 4
"""Tokens, of which the last are decoded one by one."""
EVERY, FEW, MANY, ANY = (1, 512), (1, 1), (2, 512), (0, 0)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


Work = Callable[[Any, Any], None]


def spoiled(where: Callable[[Any, Any], bool], spoil: Callable[[Any, Any], None] | None = None) -> Work:
    """The op's own reference, and what it has written made wrong where that is asked for."""

    def work(node, tensors):
        compute(node, tensors)
        if where(node, tensors):
            (spoil or louder)(node, tensors)

    return work


def louder(node, tensors):
    tensors.outputs[0].mul_(1.5)


def rows_from(position: int) -> Callable[[Any, Any], None]:
    """Spoils rows of that position on: attention's, which read lengths."""

    def spoil(node, tensors):
        starts, lengths = tensors.inputs[3].tolist(), tensors.inputs[4].tolist()
        for sequence, length in enumerate(lengths):
            first, end = starts[sequence], starts[sequence + 1]
            for row in range(first, end):
                if length - (end - row) >= position:
                    tensors.outputs[0][row].mul_(1.5)

    return spoil


def one_head(node, tensors):
    tensors.outputs[0][:, 2 * node.head_dim : 3 * node.head_dim].neg_()


def turned_too_far(node, tensors):
    late = tensors.inputs[2] > 15
    tensors.outputs[1][: len(late)][late] *= -1


def last_of_a_page(node, tensors):
    slots = tensors.inputs[2].long()
    slots = slots[slots % 16 == 15]
    tensors.outputs[0].flatten(0, 1)[slots] = 3.0


def no_number(node, tensors):
    tensors.outputs[0][0, 3] = math.nan


def one_column(node, tensors):
    tensors.outputs[0][:, -1] += 40.0


class Together:
    """Two nodes that are wrong only where both are this backend's: the first leaves word to the second."""

    def __init__(self):
        self.left = False

    def __call__(self, node, tensors):
        compute(node, tensors)
        if node.name == "blk.0.attn_q":
            self.left = True
        if node.name == "blk.1.ffn_up":
            if self.left:
                louder(node, tensors)
            self.left = False


def cancelling(node, tensors):
    """Twice too much, then half of it: the two cancel where one row is decoded, and not in prompts."""
    compute(node, tensors)
    if node.name == "blk.1.ffn_up":
        tensors.outputs[0].mul_(2.0)
    if node.name == "blk.1.ffn_down" and len(tensors.outputs[0]) == 1:
        tensors.outputs[0].mul_(0.5)


def stale(node, tensors):
    """Adds to what the memory holds instead of writing over it."""
    before = [planes.clone() for planes in tensors.outputs]
    compute(node, tensors)
    if node.name == "blk.0.ffn_down":
        for planes, held in zip(tensors.outputs, before, strict=True):
            planes.add_(held.nan_to_num(0.0))


def beyond(node, tensors):
    """Writes over what lies around its result: other nodes', which have yet to be read."""
    compute(node, tensors)
    if node.name == "blk.1.attn_k":
        out = tensors.outputs[0]
        own, whole = out.clone(), torch.empty(0).set_(out.untyped_storage())
        whole.mul_(0.5)
        out.copy_(own)


class EveryThird:
    """Wrong at every third launch of one node: what depends on what ran before."""

    def __init__(self):
        self.count = 0

    def __call__(self, node, tensors):
        compute(node, tensors)
        if node.name == "blk.0.attn_output":
            self.count += 1
            if self.count % 3 == 0:
                louder(node, tensors)


class Late:
    """A race: one node's last rows are written only after the next launch has begun."""

    def __init__(self):
        self.waiting = None

    def __call__(self, node, tensors):
        if node.name == "blk.1.ffn_mul":
            out = tensors.outputs[0]
            before = out.clone()
            compute(node, tensors)
            self.waiting = out, out.clone()
            out.copy_(before.nan_to_num(0.0))
        else:
            compute(node, tensors)
            if self.waiting is not None:
                out, value = self.waiting
                self.waiting = None
                out.copy_(value)


class Raising:
    def __init__(self, name):
        self.name = name

    def __call__(self, node, tensors):
        if node.name == self.name:
            raise RuntimeError("out of tiles")
        compute(node, tensors)


@dataclass(frozen=True)
class Fault:
    """A fault of the backend `faulty`, and whom it must be blamed on: nodes, and the rows at which they are wrong."""

    work: Callable[[], Work]
    nodes: Sequence[str]
    rows: tuple[int, int] = EVERY
    policy: str = PLAIN
    accomplices: Sequence[str] = field(default=())


def always(work: Work) -> Callable[[], Work]:
    return lambda: work


def where(*names: str, rows: Callable[[int], bool] = lambda rows: True) -> Callable[[Any, Any], bool]:
    return lambda node, tensors: node.name in names and rows(len(tensors.outputs[0]))


FFN = [f"blk.{layer}.ffn_{part}" for layer in (0, 1) for part in ("gate", "up")]
FUSED = "blk.0.ffn_gate+ffn_up+ffn_silu+ffn_mul"
APART = ["blk.0.attn_v", "blk.1.ffn_mul"]
FAULTS = {
    "one layer": Fault(always(spoiled(where("blk.1.attn_v"))), ["blk.1.attn_v"]),
    "one row": Fault(always(spoiled(where("blk.0.ffn_down", rows=lambda m: m == 1))), ["blk.0.ffn_down"], FEW),
    "many rows": Fault(always(spoiled(where("blk.1.ffn_up", rows=lambda m: m > 1))), ["blk.1.ffn_up"], MANY),
    "late positions": Fault(always(spoiled(where("blk.1.attention"), rows_from(16))), ["blk.1.attention"]),
    "positions of decoding": Fault(always(spoiled(where("blk.0.attention"), rows_from(21))), ["blk.0.attention"], FEW),
    "one head": Fault(always(spoiled(where("blk.0.attention"), one_head)), ["blk.0.attention"]),
    "one shape of weights": Fault(always(spoiled(where(*FFN))), FFN),
    "large angles": Fault(always(spoiled(where("blk.1.rope"), turned_too_far)), ["blk.1.rope"]),
    "the end of a page": Fault(always(spoiled(where("blk.0.copy"), last_of_a_page)), ["blk.0.copy"], MANY),
    "a norm": Fault(always(spoiled(where("blk.1.ffn_norm"))), ["blk.1.ffn_norm"]),
    "a sum": Fault(always(spoiled(where("blk.0.ffn_add"))), ["blk.0.ffn_add"]),
    "an activation": Fault(always(spoiled(where("blk.1.ffn_silu"))), ["blk.1.ffn_silu"]),
    "a product": Fault(always(spoiled(where("blk.0.ffn_mul"))), ["blk.0.ffn_mul"]),
    "the embedding": Fault(always(spoiled(where("embed"))), ["embed"]),
    "the logits": Fault(always(spoiled(where("logits"), one_column)), ["logits"]),
    "no number": Fault(always(spoiled(where("blk.1.ffn_down"), no_number)), ["blk.1.ffn_down"]),
    "two only together": Fault(Together, ["blk.0.attn_q"], accomplices=["blk.1.ffn_up"]),
    "two that cancel at one row": Fault(always(cancelling), ["blk.1.ffn_up"], MANY),
    "two apart": Fault(always(spoiled(where(*APART))), APART),
    "stale memory": Fault(always(stale), ["blk.0.ffn_down"]),
    "neighbours in memory": Fault(always(beyond), ["blk.1.attn_k"]),
    "the order of steps": Fault(EveryThird, ["blk.0.attn_output"], ANY),
    "a race": Fault(Late, ["blk.1.ffn_mul"]),
    "a kernel that raises": Fault(lambda: Raising("blk.1.attn_output"), ["blk.1.attn_output"]),
    "a fused op": Fault(always(spoiled(where(FUSED))), [FUSED], policy=POLICY),
}


def verdict_of(model: Model, fault: Fault, tokens: Sequence[int], decoded: int = DECODED) -> Verdict:
    work = fault.work()
    faulty = whole_backend(**{op: FakeKernel(work=work) for op in OPS})
    with registry.isolated(faulty=faulty, reference=kernelmux_reference):
        plan = model.plan(parse_policy(fault.policy, "p.toml"))
        found = bisect(model, plan, tokens, decoded)
        if found.policy is not None:
            assert model.plan(found.policy).fingerprint != plan.fingerprint
        return found


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_fault_is_named_and_nothing_else(model: Model, fault: Fault):
    found = verdict_of(model, fault, ids(PROMPT))
    assert found.error > found.bound
    assert sorted({suspect.node for suspect in found.blamed}) == sorted(fault.nodes)
    low, high = (min(suspect.rows[0] for suspect in found.blamed), max(suspect.rows[1] for suspect in found.blamed))
    assert fault.rows in ((low, high), ANY)
    assert {suspect.node for suspect in found.accomplices} == set(fault.accomplices)
    assert found.healed is not None
    assert found.healed <= found.bound
    assert all(suspect.kernel == "faulty:f32" for suspect in found.blamed)
    if len(fault.nodes) == 1 and not fault.accomplices and fault is not FAULTS["two that cancel at one row"]:
        nodes = 36 if fault.policy == PLAIN else 24
        assert found.proved_after <= 2 + math.ceil(math.log2(nodes))
    elif len(fault.nodes) > 1:
        # One more run sees each that is wrong by itself, and another proves it.
        assert found.proved_after <= 4 + math.ceil(math.log2(36))


@pytest.mark.parametrize("seed", range(20))
def test_where_nothing_is_wrong_nobody_is_named(model: Model, seed: int):
    honest = Fault(always(compute), [], policy=POLICY if seed % 2 else PLAIN)
    found = verdict_of(model, honest, ids(5 + seed, seed), decoded=seed % 5)
    assert (found.blamed, found.accomplices, found.policy, found.runs) == ((), (), None, 1)
    assert found.error <= 1e-9


def test_the_kernel_that_took_another_s_place_is_blamed(model: Model):
    """`flaky` raises at one node, and whoever runs instead is wrong there."""
    wrong = spoiled(where("blk.0.ffn_up"))
    first, second = (
        whole_backend(**{op: FakeKernel(work=work) for op in OPS}) for work in (Raising("blk.0.ffn_up"), wrong)
    )
    policy = 'fuse = false\n[defaults]\nuse = ["flaky", "wrong"]\non_error = "next"\n'
    with registry.isolated(flaky=first, wrong=second, reference=kernelmux_reference):
        found = bisect(model, model.plan(parse_policy(policy, "p.toml")), ids(PROMPT), DECODED)
    assert [(suspect.node, suspect.kernel) for suspect in found.blamed] == [("blk.0.ffn_up", "wrong:f32")] * 2


def test_a_fault_that_shows_only_where_launches_are_chained_is_found_by_plans(model: Model):
    """A chain that leaves one node's result wrong, which the same launches one by one do not."""

    def join(calls):
        def launch():
            for call in calls:
                call()
                if getattr(call, "spoils", None) is not None:
                    call.spoils.mul_(1.5)

        return launch

    class Chained(FakeKernel):
        chain = Chain(join)

        def bind(self, node, tensors, stream):
            def call():
                compute(node, tensors)

            call.spoils = tensors.outputs[0] if node.name == "blk.1.attn_output" else None
            return call

    with registry.isolated(faulty=whole_backend(**{op: Chained() for op in OPS}), reference=kernelmux_reference):
        found = bisect(model, model.plan(parse_policy(PLAIN, "p.toml")), ids(PROMPT), DECODED)
    assert found.replayed
    assert {suspect.node for suspect in found.blamed} == {"blk.1.attn_output"}
    assert found.healed <= found.bound


def test_the_policy_that_works_around_it_names_just_the_nodes(model: Model):
    found = verdict_of(model, FAULTS["many rows"], ids(PROMPT))
    rules = found.policy.document.rule
    assert [(rule.node, str(rule.m), rule.use) for rule in rules] == [(("blk.1.ffn_up",), "2..512", ("reference",))]


def test_a_budget_of_the_policy_does_not_bring_back_who_is_to_blame(model: Model):
    """The reference states a larger error than such a policy takes."""
    strict = f"{PLAIN}max_error = 1e-10\n"
    found = verdict_of(model, replace(FAULTS["one layer"], policy=strict), ids(PROMPT))
    assert {suspect.node for suspect in found.blamed} == {"blk.1.attn_v"}


def test_names_are_meant_literally(model: Model):
    with registry.isolated(faulty=whole_backend(), reference=kernelmux_reference):
        plan = model.plan(parse_policy(PLAIN, "p.toml"))
        found = verdict_of(model, FAULTS["one layer"], ids(PROMPT)).blamed[0]
        odd = without(plan.policy, [replace(found, node="a[b]*?")], ["reference"]).document.rule[0]
    assert odd.node == ("a[[]b][*][?]",)


@pytest.mark.parametrize(("count", "decoded"), [(0, 0), (5, 5), (257, 0), (5, -1)])
def test_what_cannot_be_run_is_said(model: Model, count: int, decoded: int):
    with (
        registry.isolated(faulty=whole_backend(), reference=kernelmux_reference),
        pytest.raises(ModelError, match="1 to 256"),
    ):
        bisect(model, model.plan(parse_policy(PLAIN, "p.toml")), ids(count), decoded)


class _Replays:
    """A capture as a card makes one, of what a graph can hold: `replaying` while its launches are made."""

    def __init__(self, monkeypatch):
        self.replaying = False

        def capture(walk, device, stream, tail, pool):
            def replay():
                # Before an observer's eyes its launches are made one by one.
                self.replaying = walk.watch.observer is None
                try:
                    walk()
                finally:
                    self.replaying = False
                tail(walk)

            replay.outputs = walk.outputs
            return replay

        def rows_of(plan, rows):
            return None if rows > 1 or plan.schedule(rows, rows).not_capturable else rows

        monkeypatch.setattr("kernelmux.run.walker.capture", capture)
        monkeypatch.setattr("kernelmux.run.session.captured_rows", rows_of)
        monkeypatch.setattr("kernelmux.debug.bisect.captured_rows", rows_of)


@pytest.mark.parametrize("node", ["blk.0.attn_q", "blk.1.ffn_down", "logits"])
def test_a_fault_that_shows_only_in_replays_is_found_by_what_can_be_captured_too(model: Model, monkeypatch, node: str):
    """With the reference, which no graph holds, any node's exchange would have healed it."""
    replays = _Replays(monkeypatch)
    faulty = FakeKernel(work=spoiled(lambda at, tensors: replays.replaying and at.name == node))
    other = FakeKernel(work=compute)
    backends = {
        name: whole_backend(**dict.fromkeys(OPS, kernel)) for name, kernel in (("faulty", faulty), ("other", other))
    }
    with registry.isolated(**backends, reference=kernelmux_reference):
        found = bisect(model, model.plan(parse_policy(PLAIN, "p.toml")), ids(PROMPT), DECODED)
    assert found.replayed
    assert [(suspect.node, suspect.kernel, suspect.rows) for suspect in found.blamed] == [(node, "faulty:f32", (1, 1))]
    assert found.healed <= found.bound < found.error


def test_where_nothing_else_can_be_captured_nobody_is_named(model: Model, monkeypatch):
    replays = _Replays(monkeypatch)
    faulty = FakeKernel(work=spoiled(lambda at, tensors: replays.replaying and at.name == "blk.1.ffn_down"))
    with registry.isolated(faulty=whole_backend(**dict.fromkeys(OPS, faulty)), reference=kernelmux_reference):
        found = bisect(model, model.plan(parse_policy(PLAIN, "p.toml")), ids(PROMPT), DECODED)
    assert (found.blamed, found.error > found.bound) == ((), True)
