"""Cases of a real run: what is written down, what is not, and that the suite runs them as its own."""

from __future__ import annotations

import itertools
import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest

import kernelmux
from command import assert_one_line_error, call_command
from fake_backend import CPU, FakeKernel, compute, plan_for, whole_backend
from kernelmux.conformance import suite
from kernelmux.conformance.case_file import capture_cases, read_cases
from kernelmux.conformance.draw import draw_case
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import KernelmuxError
from kernelmux.graph.formats import as_planes
from kernelmux.graph.graph import PAGE_SIZE, case_node
from kernelmux.graph.ops import OPS
from kernelmux.run.walker import Walker
from tiny_model import write_tiny_llama

PROMPT = "hello there"
TOKENS = 6
DRAWN_PER_OP = 6


@pytest.fixture(scope="module")
def captured(tiny, tmp_path_factory):
    """The file of a run whose prompt was read in one step and answered in five, all in f32."""
    path = tmp_path_factory.mktemp("captured") / "cases.json"
    asked = ("-p", PROMPT, "--max-tokens", TOKENS, "--use", "*=torch:f32,torch:sdpa,torch:rows")
    assert call_command("run", tiny, *asked, "--capture-cases", path).code == 0
    return path


@pytest.fixture(scope="module")
def cases(captured):
    return {case.name: case for case in read_cases(captured).cases}


def check(*arguments):
    result = call_command("check", "--json", *arguments)
    return result.code, json.loads(result.out)["outcomes"]


def values(case, port):
    return case.draw[port](None).tolist()


# What is written.


def test_each_distinct_shape_of_the_run_is_one_case(tiny, cases):
    graph = kernelmux.load(tiny).graph
    ids = len(kernelmux.load(tiny).encode(PROMPT))
    dims = {"m": 0, "outs": 1, "seqs": 1, "seqs+1": 2, "width": 1, "pages": 1, "page_size": PAGE_SIZE}

    def shape(node):
        stored = [(value.shape, value.format) for value in (*node.inputs, *node.weights, *node.outputs)]
        return node.op, *stored, node.rotation, node.epsilon, node.scale

    ran = {shape(node.resolve({**dims, "m": m})) for node, m in itertools.product(graph.ops, (ids, 1))}
    found = [shape(case_node(case)) for case in cases.values()]
    assert len(found) == len(set(found))
    assert set(found) == ran
    assert {f"captured/mul_mat-m{m}-n96-k64-f32" for m in (1, ids)} <= cases.keys()


def test_step_state_is_as_it_was_in_the_last_step_of_its_shape(tiny, cases):
    ids = len(kernelmux.load(tiny).encode(PROMPT))
    last = ids + TOKENS - 1
    decode, prompt = (
        next(case for case in cases.values() if case.op == "attention" and case.inputs[0].shape[0] == m)
        for m in (1, ids)
    )
    assert (values(prompt, "query_start"), values(prompt, "kv_len")) == ([0, ids], [ids])
    assert (values(decode, "query_start"), values(decode, "kv_len")) == ([0, 1], [last])
    assert values(decode, "block_table") == [[0]]
    rope = next(case for case in cases.values() if case.op == "rope" and case.inputs[0].shape[0] == ids)
    assert values(rope, "positions") == list(range(ids))
    assert values(cases["captured/copy-m1-num_kv_heads2-head_dim16-f32"], "slots") == [last - 1]


def test_what_was_asked_is_not_in_the_file(captured, tiny):
    """Neither the prompt nor its ids: an id stands where it would be found, in `values` of an embed."""
    entries = json.loads(captured.read_text())["cases"]
    embeds = [entry["values"] for entry in entries if entry["graph"].startswith("captured/embed")]
    assert {"ids": {"from": 0, "to": kernelmux.load(tiny).source.shape.vocab - 1}} in embeds
    assert all(set(stated) == {"ids"} and set(stated["ids"]) == {"from", "to"} for stated in embeds)
    assert PROMPT not in captured.read_text()


def test_scaled_rotations_are_kept(without_numba, tmp_path):
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model = write_tiny_llama(tmp_path / "scaled.gguf", extra=scaled)
    path = tmp_path / "cases.json"
    assert call_command("run", model, "-p", "hello", "--max-tokens", 1, "--capture-cases", path).code == 0
    (rope,) = (case for case in read_cases(path).cases if case.op == "rope")
    assert (rope.fields["rotation"].scaling, rope.fields["rotation"].factor) == ("linear", 4.0)


def renamed(node):
    """A node without what names its tensors."""

    def bare(values):
        return tuple(replace(value, name="") for value in values)

    groups = {key: bare(getattr(node, key)) for key in ("inputs", "outputs", "weight", "bias", "gamma")}
    return replace(node, name="", **groups)


@pytest.mark.parametrize("op", OPS)
def test_every_field_and_format_of_an_op_comes_back(op, tmp_path):
    """Cases of the suite itself, walked as graphs: fused ops, biases, divisors, windows, empty sequences."""
    of_op = [case for case in OPS[op].cases() if "large" not in case.marks]
    for case in of_op[:: max(1, len(of_op) // DRAWN_PER_OP)]:
        drawn = draw_case(case)
        with registry.isolated(a=whole_backend()) as found:
            plan = plan_for(drawn.graph, found, "[defaults]\nuse = ['a']\n", max_rows=512)
        leaves = {name: as_planes(planes) for name, planes in drawn.inputs.items()}
        session = SimpleNamespace(walker=Walker(plan, PackedWeights(drawn.weights, CPU), leaves))
        with capture_cases(session, tmp_path / "cases.json"):
            session.walker.bind(m=1)
        (back,) = read_cases(tmp_path / "cases.json").cases
        assert renamed(case_node(back)) == renamed(case_node(case))
        state = [(port, value.name) for port, value in zip(OPS[op].inputs, case.inputs, strict=False)]
        for port, name in state:
            if port in back.draw and port != "ids":
                assert values(back, port) == drawn.inputs[name][0].tolist()


def test_a_walk_that_is_replayed_is_noted_when_it_is_captured(without_numba, tiny, tmp_path, monkeypatch):
    """On the CPU, where nothing is captured: what CUDA would replay is only bound."""
    monkeypatch.setattr(Walker, "capture", lambda self, tail, **dims: SimpleNamespace(walk=Walker.bind(self, **dims)))
    model = kernelmux.load(tiny)
    session = model.session(model.plan(), tokens=8, sequences=4)
    with capture_cases(session, tmp_path / "cases.json"):
        session.walker.capture(print, m=4, outs=4, seqs=4)
    found = {case.name: case for case in read_cases(tmp_path / "cases.json").cases}
    assert "captured/silu-m4-n96" in found
    assert values(found["captured/rope-m4-num_heads4-num_kv_heads2-head_dim16"], "positions") == [0] * 4


def test_a_run_that_raises_leaves_its_cases_and_a_replaced_kernel_costs_none(tiny, tmp_path):
    def breaks(node, tensors):
        if node.outputs[0].extents[0] == 1:
            raise RuntimeError("one row is too few")
        compute(node, tensors)

    path, policy = tmp_path / "cases.json", tmp_path / "policy.toml"
    asked = ("run", tiny, "-p", PROMPT, "--max-tokens", 3, "--policy", policy, "--capture-cases", path)
    for on_error, code in (("error", 2), ("next", 0)):
        policy.write_text(f'[defaults]\nuse = ["bad", "good"]\non_error = "{on_error}"\n')
        with registry.isolated(bad=backend(silu=FakeKernel(work=breaks)), good=whole_backend()):
            assert call_command(*asked).code == code
        found = {case.name for case in read_cases(path).cases}
        assert {"captured/silu-m5-n96", "captured/silu-m1-n96", "captured/mul_mat-m1-n269-k64-f32"} <= found


def test_a_file_that_cannot_be_written_is_one_line_before_the_run(tiny, tmp_path):
    result = call_command("run", tiny, "-p", PROMPT, "--capture-cases", tmp_path / "no" / "cases.json")
    assert_one_line_error(result, "there is no folder", "to write cases.json to")


# The suite with such a file.


def test_captured_cases_pass_on_the_reference(captured, cases):
    code, outcomes = check("--backend", "reference", "--cases", captured)
    assert code == 0
    assert {outcome["status"] for outcome in outcomes} == {"pass"}
    assert {outcome["case"] for outcome in outcomes if "@" not in outcome["case"]} == set(cases)


def test_filters_hold_for_them(captured, cases):
    listed = call_command("check", "--cases", captured, "--list", "--op", "rope", "--kernel", "torch:f32").out
    assert [line.split("\t")[1] for line in listed.splitlines()] == [n for n in cases if cases[n].op == "rope"]
    name = next(iter(cases))
    _, outcomes = check("--cases", captured, "--kernel", "torch:rows", "--case", name)
    assert [outcome["case"] for outcome in outcomes] == [name]
    missing = call_command("check", "--cases", captured, "--op", "swiglu")
    assert_one_line_error(missing, "no case matches --op swiglu")


def test_a_failure_comes_with_what_runs_it_again(captured):
    def off(node, tensors):
        compute(node, tensors)
        tensors.outputs[0].add_(1)

    with registry.isolated(wrong=backend(silu=FakeKernel(work=off))):
        code, outcomes = check("--cases", captured, "--case", "captured/silu-m1-*")
        assert (code, len(outcomes)) == (1, 1)
        program, command, *again = shlex.split(outcomes[0]["command"])
        assert (program, command) == ("kernelmux", "check")
        code, repeated = check(*again)
    assert (code, [outcome["case"] for outcome in repeated]) == (1, ["captured/silu-m1-n96"])


def test_one_line_hooks_them_up(captured, cases):
    (marker,) = suite("reference", cases=captured).test_case.pytestmark
    assert {parameter.values[0].case.name for parameter in marker.args[1]} == set(cases)


# Files that are wrong.


def spoil(document, *path, to):
    """A copy of a document with one place changed."""
    copy = json.loads(json.dumps(document))
    *parents, last = path
    place = copy
    for key in parents:
        place = place[key]
    place[last] = to
    return copy


def first(entries, op):
    return next(index for index, entry in enumerate(entries) if entry["graph"].startswith(f"captured/{op}-"))


@pytest.mark.parametrize(
    ("op", "path", "to", "hint"),
    [
        ("silu", ("nodes", 1, "op"), "silo", "did you mean 'silu'?"),
        ("silu", ("nodes", 0, "outputs", 0, "format"), "f33", "unknown format 'f33'"),
        ("silu", ("nodes", 0, "outputs", 0, "shape"), ["m", 96], "silu"),
        ("silu", ("nodes",), [], "graph"),
        ("silu", ("graph",), "", "named by `graph`"),
        ("silu", ("values",), {"y": [1]}, "`values` names 'y'"),
        ("silu", ("values",), [1], "maps the names"),
        ("silu", ("values",), {"x": {"from": 0}}, "no range of it"),
        ("rope", ("values",), {}, "positions is i32"),
        ("rope", ("values", "positions"), [0], "positions as integers [5]"),
        ("rope", ("values", "positions"), [0.5] * 5, "positions as integers [5]"),
        ("rope", ("values", "positions"), [[0], [1, 2]], "positions as integers [5]"),
        ("rope", ("values", "positions"), [2**40] * 5, "positions must be from"),
        ("attention", ("values", "kv_len"), [PAGE_SIZE + 1], f"kv_len must be from 0 to {PAGE_SIZE}"),
        ("attention", ("values", "block_table"), [[1]], "block_table must be from 0 to 0"),
        ("copy", ("values", "slots"), [-2] * 5, f"slots must be from -1 to {PAGE_SIZE - 1}"),
        ("embed", ("values", "ids"), {"from": 0, "to": 269}, "ids must be from 0 to 268"),
        ("embed", ("values", "ids"), {"from": 0.5, "to": 1.5}, "no range of it"),
        ("embed", ("values", "ids"), {"from": 2, "to": 1}, "no range of it"),
        ("mul_mat", ("values",), {"weight": "all"}, "give weight as integers [64, 64]"),
    ],
)
def test_a_wrong_case_is_one_line_with_file_and_number(captured, tmp_path, op, path, to, hint):
    document = json.loads(captured.read_text())
    index = first(document["cases"], op)
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(spoil(document, "cases", index, *path, to=to)))
    numbered = f"{bad}: case {index + 1} of {len(document['cases'])}"
    assert_one_line_error(call_command("check", "--cases", bad), numbered, hint)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "no file of cases"),
        ("{", "no file of cases"),
        ("\xff", "no file of cases"),
        ("[1]", "schema 1 is wanted, not None"),
        ('{"schema": 2, "cases": []}', "schema 1 is wanted, not 2"),
        ('{"schema": 1}', "holds no cases"),
        ('{"schema": 1, "cases": []}', "holds no cases"),
        ('{"schema": 1, "cases": [3]}', "case 1 of 1"),
    ],
)
def test_a_file_that_is_none_is_one_line_with_its_name(tmp_path, text, hint):
    bad = tmp_path / "bad.json"
    bad.write_text(text, "latin-1")
    assert_one_line_error(call_command("check", "--cases", bad), str(bad), hint)


def test_two_cases_of_one_name_are_refused(captured, tmp_path):
    document = json.loads(captured.read_text())
    document["cases"].append(document["cases"][0])
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(KernelmuxError, match="another is named"):
        read_cases(tmp_path / "bad.json")


# The real model.


@pytest.mark.model
def test_smollm2_gives_its_distinct_ops(smollm2, tmp_path):
    path = tmp_path / "cases.json"
    asked = ("-p", "The capital of France is", "--max-tokens", 2, "--capture-cases", path)
    assert call_command("run", smollm2, *asked, "--use", "*=torch:f32,torch:sdpa,torch:rows").code == 0
    found = {case.name.removeprefix("captured/") for case in read_cases(path).cases}
    shapes = ("n576-k576", "n192-k576", "n1536-k576", "n576-k1536")
    assert {name for name in found if name.startswith("mul_mat")} == {
        *(f"mul_mat-m{m}-{shape}-Q4_1" for m in (1, 5) for shape in shapes),
        "mul_mat-m1-n49152-k576-Q8_0",
    }
    heads = "num_heads9-num_kv_heads3-head_dim64"
    for m in (1, 5):
        assert {f"rope-m{m}-{heads}", f"attention-m{m}-{heads}-f32", f"silu-m{m}-n1536"} <= found
    code, outcomes = check("--backend", "reference", "--cases", path, "--op", "attention")
    assert (code, {outcome["status"] for outcome in outcomes}) == (0, {"pass"})
