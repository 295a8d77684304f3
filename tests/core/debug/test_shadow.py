"""Shadowed steps give the same results; a kernel that is wrong for some rows is named with them, and no other is."""

import json
import math

import pytest

import kernelmux
import kernelmux_reference
import kernelmux_torch
from command import assert_one_line_error, call_command
from fake_backend import FakeKernel, compute, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.contract.device import Platform
from kernelmux.debug.second import Second
from kernelmux.debug.shadow import Shadow
from kernelmux.debug.together import Together
from kernelmux.errors import KernelmuxError
from kernelmux.graph.formats import as_tuple
from kernelmux.graph.ops import OPS
from kernelmux.policy.policy import parse_policy
from kernelmux.run import capture
from wrong.kernel import Right

POLICY = '[[rule]]\nnode = "{}"\nuse = "odd"\n[defaults]\nuse = ["torch", "reference"]\n'
IDS = [3, 1, 4, 1, 5]


class Odd(Right):
    """Is off by a thousandth of its largest number in one row of a prompt, or raises there."""

    ops = ("mul_mat",)

    def __init__(self, row=3, raises=False):
        self.row, self.raises = row, raises

    def launch(self, node, tensors):
        if self.raises:
            raise OverflowError("too many rows")
        super().launch(node, tensors)
        out = as_tuple(tensors.outputs[0])[0]
        if len(out) > self.row:
            out[self.row] += 0.3 * out.abs().max()


def backends(kernel):
    return registry.isolated(odd=backend(mul_mat=kernel), torch=kernelmux_torch, reference=kernelmux_reference)


def decoded(session, steps=6):
    sequence = session.open()
    logits = session.feed(sequence, IDS).clone()
    return logits, list(session.decode([sequence], [int(logits.argmax())], steps))


def session_of(tiny, node="none.such"):
    model = kernelmux.load(tiny)
    return model.session(model.plan(parse_policy(POLICY.format(node), "p.toml"), max_rows=8), 64)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("torch", Second("torch")),
        ("torch:f32", Second("torch", "torch:f32")),
        ("torch:1/1", Second("torch", "", 1)),
        ("torch:f32:1/7", Second("torch", "torch:f32", 7)),
    ],
)
def test_what_shadows_is_read_of_a_word(text, read):
    assert Second.parse(text) == read


@pytest.mark.parametrize("text", ["", "torch:", "torch:1/0", "torch:2/3", "a b", "torch:f32:bf16", "1/3"])
def test_what_is_no_shadow_is_refused(text):
    with pytest.raises(KernelmuxError, match="a shadow is BACKEND"):
        Second.parse(text)


def test_the_node_and_the_rows_are_named_and_no_other(tiny):
    with backends(Odd()):
        session = session_of(tiny, "blk.1.ffn_down")
        shadow = Shadow(session, Second.parse("reference:1/1"))
        with session.watched(shadow):
            decoded(session)
    (found,) = shadow.over
    assert (found.node, found.kernel, found.second) == ("blk.1.ffn_down", "odd:kernel", "reference:f32")
    assert (found.over, found.position, found.launches) == ((3, 3), 3, 7)
    assert found.worst > 1e-3 > found.bound
    for part in ("blk.1.ffn_down (mul_mat): odd:kernel", "from reference:f32", "of 7 launches", "position 3"):
        assert part in str(found)
    assert not shadow.missing


def test_sound_kernels_are_within_what_they_state_and_results_the_same(tiny):
    with backends(Odd()):
        plain = decoded(session_of(tiny))
        session = session_of(tiny)
        shadow = Shadow(session, Second.parse("reference:1/3"))
        with session.watched(shadow):
            shadowed = decoded(session)
    assert shadowed[0].equal(plain[0])
    assert shadowed[1] == plain[1]
    assert (shadow.walks, shadow.sampled, shadow.over) == (7, 3, [])
    assert {each.launches for each in shadow.found} == {3}
    assert {each.node for each in shadow.found} == {step.node.name for step in session.plan.steps}


def test_a_bound_of_ones_own_is_kept(tiny):
    with backends(Odd()):
        session = session_of(tiny)
        strict, lax = (Shadow(session, Second.parse("reference:1/1"), limit) for limit in (0.0, 1.0))
        with session.watched(Together([strict, lax])):
            decoded(session)
    assert strict.over
    assert not lax.over


def test_nodes_that_the_second_backend_does_not_take_are_told(tiny):
    few = backend(mul_mat=lambda node, m: Declined("no wide ones") if "ffn" in node.name else Right(), add=Right())
    with registry.isolated(few=few, reference=kernelmux_reference):
        model = kernelmux.load(tiny)
        plain = parse_policy('fuse = false\n[defaults]\nuse = ["reference"]\n', "p.toml")
        session = model.session(model.plan(plain), 64)
        shadow = Shadow(session, Second.parse("few:1/1"))
        with session.watched(shadow):
            decoded(session)
    assert {each.op for each in shadow.found} == {"mul_mat", "add"}
    assert shadow.missing["blk.0.ffn_down"] == "no wide ones"
    assert not any("ffn" in each.node for each in shadow.found if each.op == "mul_mat")


def test_a_second_kernel_that_raises_or_makes_nan_ends_nothing(tiny):
    with backends(Odd(raises=True)):
        plain = decoded(session_of(tiny))
        session = session_of(tiny)
        shadow = Shadow(session, Second.parse("odd:1/1"))
        with session.watched(shadow):
            shadowed = decoded(session)
    assert shadowed[0].equal(plain[0])
    assert shadow.missing["logits"].startswith("odd:kernel raised: too many rows (test_shadow.py:")


def test_a_second_kernel_that_writes_over_its_inputs_changes_nothing(tiny):
    class Greedy(Right):
        def launch(self, node, tensors):
            super().launch(node, tensors)
            for planes in tensors.inputs:
                for part in as_tuple(planes):
                    part.zero_()

    greedy = Greedy()
    with registry.isolated(greedy=backend(mul_mat=greedy, copy=greedy, add=greedy), reference=kernelmux_reference):
        model = kernelmux.load(tiny)
        plan = model.plan(use=["*=reference"])
        plain = decoded(model.session(plan, 64))
        session = model.session(plan, 64)
        with session.watched(Shadow(session, Second.parse("greedy:1/1"))):
            shadowed = decoded(session)
    assert shadowed[0].equal(plain[0])
    assert shadowed[1] == plain[1]


def test_a_run_tells_of_it_and_a_script_gets_all(tiny, tmp_path):
    policy = tmp_path / "p.toml"
    policy.write_text(POLICY.format("blk.1.ffn_down"))
    asked = ("run", tiny, "-p", "hello there", "--max-tokens", 4, "--policy", policy, "--shadow", "reference:1/1")
    with backends(Odd()):
        told = call_command(*asked).err
        assert "shadow reference:1/1: 4 of 4 steps" in told
        assert "kernelmux: shadow: blk.1.ffn_down (mul_mat): odd:kernel is" in told
        document = json.loads(call_command(*asked, "--json").out)["shadow"]
        bench = ("bench", "model", tiny, "--prompt", 4, "--context", 4, "--decode", 2, "--max-rows", 4)
        timed = json.loads(call_command(*bench, "--shadow", "reference:1/2", "--json").out)["shadow"]
    assert document["nodes"][0]["node"] == "blk.1.ffn_down"
    assert (document["steps"], document["sampled"], document["missing"]) == (4, 4, {})
    assert timed["sampled"] == -(-timed["steps"] // 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shadow", "torhc"], "no backend 'torhc' to shadow with (did you mean 'torch'?)"),
        (["--shadow", "reference:f23"], "no kernel reference:f23 to shadow with (did you mean 'reference:f32'"),
        (["--shadow", "torch:1/0"], "a shadow is BACKEND[:KERNEL][:1/N]"),
    ],
)
def test_what_cannot_shadow_is_one_line(tiny, options, said):
    assert_one_line_error(call_command("run", tiny, "-p", "hello", *options), said)


def test_what_was_found_is_told_though_the_run_fails(tiny):
    """The step's logits are NaN; which node is wrong was known, and was not said."""

    def work(node, tensors):
        compute(node, tensors)
        if node.name == "blk.1.ffn_down":
            tensors.outputs[0].fill_(math.nan)

    odd = backend(mul_mat=FakeKernel(work=work))
    with registry.isolated(odd=odd, reference=kernelmux_reference):
        asked = ("run", tiny, "-p", "hello", "--max-tokens", 2, "--use", "mul_mat=odd", "--shadow", "reference:1/1")
        result = call_command(*asked)
    assert result.code == 2
    assert "kernelmux: shadow: blk.1.ffn_down (mul_mat): odd:f32 is inf from reference:f32" in result.err


def louder_in_decoding(node, tensors):
    compute(node, tensors)
    if node.name == "blk.1.ffn_down" and len(tensors.outputs[0]) == 1:
        tensors.outputs[0].mul_(1.5)


def test_from_the_second_sample_on_a_captured_step_is_one_graph_with_its_second_launches(tiny, monkeypatch):
    """A stand-in for a graph makes all launches that were recorded again at each replay."""
    graphs = []

    class Graph:
        def __init__(self, walk, stream, tail, pool, observer):
            graphs.append(type(observer).__name__)
            self.walk, self.tail, self.observer = walk, tail, observer

        def replay(self):
            assert capture._record(self.walk, self.walk.device.platform, self.observer) is None
            self.tail(self.walk)

    monkeypatch.setattr(capture, "_recorded", Graph)
    monkeypatch.setattr(Platform, "captures", True)
    monkeypatch.setattr(Platform, "is_capturing", lambda self: True)
    kernels = {"wrong": FakeKernel(work=louder_in_decoding), "right": FakeKernel(work=compute)}
    backends = {name: whole_backend(**dict.fromkeys(OPS, kernel)) for name, kernel in kernels.items()}
    with registry.isolated(**backends):
        model = kernelmux.load(tiny)
        plan = model.plan(parse_policy('fuse = false\n[defaults]\nuse = ["wrong"]\n', "p.toml"))
        plain = decoded(model.session(plan, 64), 20)
        session = model.session(plan, 64)
        shadow = Shadow(session, Second.parse("right:1/4"))
        with session.watched(Together([shadow])):
            looked = decoded(session, 20)
    assert (looked[0].equal(plain[0]), looked[1]) == (True, plain[1])
    assert graphs == ["Observer", "Observer", "Together"]
    assert shadow.sampled == 6
    (found,) = shadow.over
    # The first sample is of the prompt.
    assert (found.node, found.launches, found.over) == ("blk.1.ffn_down", 6, (8, 24))
