"""A plan on file: read back it is the very same plan, or one line says what has changed since."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_backend import CPU, FakeKernel, chain, graphs, llama_graph, plan_for, silu_graph, whole_backend
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.errors import PlanError
from kernelmux.plan.lock import read_lock, write_lock
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import parse_policy

POLICY = """\
[[rule]]
op = ["mul_mat", "qkv"]
m = "1..4"
use = "a:fast"
max_error = 1e-2

[[rule]]
layer = "1..1"
op = ["rms_norm", "mul_mat"]
use = "b"

[defaults]
use = ["a"]

[kv]
format = "bf16"
"""
DEFAULTS = '[defaults]\nuse = ["a"]\n'


BOTH = [FakeKernel(packed_bytes=128), FakeKernel("fast", precision=1e-4, takes=["bf16"], packed_bytes=64)]


def backends():
    """`a` has a second kernel for weights that wants bf16; `b` has everything."""
    return {"a": whole_backend(mul_mat=BOTH, qkv=BOTH), "b": whole_backend()}


def locked(path, graph=None, policy=POLICY, **others):
    """A plan that has been written to `path`."""
    with registry.isolated(**{**backends(), **others}) as found:
        plan = plan_for(graph or llama_graph(2), found, policy)
    write_lock(plan, path)
    return plan


def read(path, graph=None, device=CPU, **others):
    """The plan of a lock file; a backend given as None is gone."""
    kept = {name: plugin for name, plugin in {**backends(), **others}.items() if plugin is not None}
    with registry.isolated(**kept) as found:
        return read_lock(path, graph or llama_graph(2), found, device)


def described(plan):
    """Every step of every schedule, with its kernel and the formats in which its values are stored."""
    return {
        key: [
            (step.node, step.choice.name, step.choice.kernel.version, step.choice.kernel.launches)
            for step in schedule.steps
        ]
        for key, schedule in plan.schedules.items()
    }


def assert_same_plan(found, wanted):
    assert found.fingerprint == wanted.fingerprint
    assert (found.buckets, found.fused) == (wanted.buckets, wanted.fused)
    assert described(found) == described(wanted)
    assert {key: s.layout for key, s in found.schedules.items()} == {k: s.layout for k, s in wanted.schedules.items()}
    assert (found.packed_forms, found.kv_bytes_per_token) == (wanted.packed_forms, wanted.kv_bytes_per_token)


def test_a_plan_read_back_is_the_same_plan(tmp_path):
    plan = locked(tmp_path / "p.json")
    # It has something of everything.
    assert plan.buckets == (4, 8)
    assert {"qkv", "swiglu"} <= {step.node.op for step in plan.schedule(1, 1).steps}
    assert {"qkv_rope_copy", "gate_up_swiglu"} <= {step.node.op for step in plan.schedule(8, 8).steps}
    assert plan.schedule(1, 1).conversions
    assert not plan.schedule(8, 8).conversions
    found = read(tmp_path / "p.json")
    assert_same_plan(found, plan)
    assert found == plan


def edited(path, edit):
    """The lock file with an edit of its JSON."""
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "edit",
    [
        lambda lock: next(iter(lock["steps"].values())).update(reason="because"),
        lambda lock: lock["policy"]["document"]["defaults"].update(on_error="next"),
        lambda lock: lock["policy"]["document"]["rule"][1].update(use=["a"]),
        lambda lock: lock.update(banned=[["a:fast", "x"]]),
        lambda lock: lock.update(notes=["no"]),
        lambda lock: lock.update(checksum="0" * 16),
    ],
    ids=["reason", "on_error", "use", "banned", "notes", "checksum"],
)
def test_what_a_hand_has_changed_is_never_taken_for_the_plan(tmp_path, edit):
    locked(tmp_path / "p.json")
    edited(tmp_path / "p.json", edit)
    with pytest.raises(PlanError, match="lock it anew"):
        read(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda lock: lock.pop("graph"), "field required at graph"),
        (lambda lock: lock.update(schedules={}), "it has no schedules"),
        (lambda lock: lock["schedules"].update(many={}), "'many' is no pair of row counts, as 1/1"),
        (lambda lock: lock["schedules"]["4/4"].update(logits="c:nope"), "'c:nope' is none of its steps"),
    ],
)
def test_a_damaged_file_says_where(tmp_path, edit, said):
    locked(tmp_path / "p.json")
    edited(tmp_path / "p.json", edit)
    with pytest.raises(PlanError, match=re.escape(said)):
        read(tmp_path / "p.json")


def test_a_lock_of_a_plan_that_was_read_is_the_same_file(tmp_path):
    locked(tmp_path / "p.json")
    write_lock(read(tmp_path / "p.json"), tmp_path / "q.json")
    assert (tmp_path / "q.json").read_text() == (tmp_path / "p.json").read_text()


@pytest.mark.parametrize(
    "policy",
    [
        "",
        f"fuse = false\n{DEFAULTS}",
        f'forbid = "a"\n{DEFAULTS}',
        f'[kv]\nformat = "f16"\n{DEFAULTS}',
        f"[weights]\ncopies = 1\n{DEFAULTS}",
        f'[[rule]]\nm = "3..5"\nuse = "b"\n{DEFAULTS}',
        f"{DEFAULTS}max_error = 1e-8\n",
        f'[[rule]]\nop = "mul_mat"\nuse = "a:fast"\nmax_error = 1e-2\n{DEFAULTS}max_error = 1e-8\n',
    ],
    ids=["empty", "plain", "forbid", "cache", "copies", "rows", "budget", "a rule's budget"],
)
def test_whatever_the_policy_said_the_plan_is_read_back(tmp_path, policy):
    plan = locked(tmp_path / "p.json", policy=policy)
    assert_same_plan(read(tmp_path / "p.json"), plan)


rules = st.builds(
    lambda op, m, use: f'[[rule]]\nop = "{op}"\nm = "{m}"\nuse = "{use}"\n',
    st.sampled_from(["mul_mat", "add", "silu", "rms_norm"]),
    st.sampled_from(["1", "2..3", "3", "4.."]),
    st.sampled_from(["a:fast", "a", "b"]),
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(graph=graphs(), policy=st.lists(rules, max_size=3).map(lambda rules: "".join(rules) + DEFAULTS))
def test_any_plan_is_read_back(tmp_path_factory, graph, policy):
    path = tmp_path_factory.getbasetemp() / "any.json"
    bf16 = FakeKernel("fast", takes=["bf16"], emits=["bf16"])
    mixed = whole_backend(**{op: [FakeKernel(), bf16] for op in ("mul_mat", "add", "silu", "rms_norm")})
    plan = locked(path, graph, policy, a=mixed)
    assert_same_plan(read(path, graph, a=mixed), plan)


# What has changed.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"graph": llama_graph(3)}, "the graph is llama .*, the plan was locked with llama .*; lock it anew"),
        ({"graph": llama_graph(2, weight="bf16")}, "the graph is "),
        ({"device": Device("cuda", 0, "H100", (9, 0))}, "the device class is cuda sm_90 H100, .* locked with cpu"),
        (
            {"b": whole_backend(rms_norm=FakeKernel(version="2"))},
            "the version of rms_norm b:f32 is 2, the plan was locked with 1",
        ),
        (
            {
                "a": whole_backend(
                    qkv=FakeKernel("fast", version="7"), mul_mat=backends()["a"].dispatch_mul_mat(None, 1)
                )
            },
            "the version of qkv a:fast is 7",
        ),
        ({"b": None}, r"locked with b:f32 for blk\.1\.attn_norm, which is not to be had: not installed"),
        ({"b": whole_backend(rms_norm=FakeKernel("better"))}, r"locked with b:f32 for blk\.1\.attn_norm, which is not"),
        (
            {"b": whole_backend(rms_norm=FakeKernel(emits=["bf16"]))},
            r"the formats of blk\.1\.attn_norm, blk\.1\.ffn_norm at up to 4/4, 8/4, 8/8 rows is f32, bf16, "
            "the plan was locked with f32, f32; the kernel of",
        ),
    ],
    ids=["layers", "weights", "device", "version", "fused version", "backend gone", "kernel gone", "other formats"],
)
def test_a_lock_is_refused_in_one_line_where_something_has_changed(tmp_path, changed, message):
    locked(tmp_path / "p.json")
    with pytest.raises(PlanError, match=message) as caught:
        read(tmp_path / "p.json", **changed)
    assert "\n" not in str(caught.value)


def test_hundreds_of_differences_are_told_in_a_few_lines_alike_layers_as_one(tmp_path):
    graph, policy = llama_graph(30), 'fuse = false\n[defaults]\nuse = "a"\n'
    plan = locked(tmp_path / "p.json", graph, policy)
    with pytest.raises(PlanError) as caught:
        read(tmp_path / "p.json", graph, a=whole_backend(mul_mat=BOTH, qkv=BOTH, silu=FakeKernel(emits=["bf16"])))
    _, _, told = str(caught.value).partition(": ")
    places = ", ".join(f"{m}/{outs}" for m, outs in plan.schedules)
    formats, _, version, kernel, last = told.split("; ")
    assert formats == (
        f"the formats of blk.0..29.ffn_silu at up to {places} rows is f32, bf16, the plan was locked with f32, f32"
    )
    assert version == "the version of convert a:f32 is 1, the plan was locked with none"
    assert kernel == (
        f"the kernel of blk.0..29.ffn_silu.as_f32 at up to {places} rows is a:f32, the plan was locked with none"
    )
    assert last == "lock it anew"


def test_one_card_of_a_class_runs_what_was_locked_on_another(tmp_path):
    first, second = (Device("cuda", index, "H100", (9, 0)) for index in (0, 1))
    with registry.isolated(**backends()) as found:
        plan = make_plan(silu_graph(), parse_policy(DEFAULTS, "p.toml"), found, first)
        write_lock(plan, tmp_path / "p.json")
        assert read_lock(tmp_path / "p.json", silu_graph(), found, second).fingerprint == plan.fingerprint


def test_a_backend_that_came_since_changes_nothing(tmp_path):
    plan = locked(tmp_path / "p.json")
    assert_same_plan(read(tmp_path / "p.json", **{"0": whole_backend()}), plan)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"lock": 2}', '"lock"', '{"lock": 1}', "\xff\x00", "[" * 100_000, "9" * 5000, "null", "{"],
    ids=["empty", "list", "object", "other version", "text", "bare", "binary", "deep", "number", "null", "open"],
)
def test_a_file_that_is_no_lock_is_named(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=r"p\.json: [^\n]+$"):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"none\.json: the lock file cannot be read: No such file"):
        read(tmp_path / "none.json")


# Damage.

VALUES = [None, True, 0, 1, -1, 8, 3.5, "", "x", "a:f32", "b", [], {}, [1], {"1": {}}, ["a:f32"], {"x": 1}]


def _places(document, at=()):
    """Every place of a JSON document, as the keys that lead there."""
    yield at
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from _places(value, (*at, key))


def _mutate(chance, document):
    """The document with one place changed, left out, or under another key."""
    document = json.loads(json.dumps(document))
    *way, key = chance.choice([place for place in _places(document) if place])
    parent = document
    for step in way:
        parent = parent[step]
    kind = chance.randrange(3)
    if kind == 0:
        parent[key] = chance.choice(VALUES)
    elif kind == 1:
        del parent[key]
    elif isinstance(parent, dict):
        parent[chance.choice(["8", "-1", "x", "1000000", "4", ""])] = parent.pop(key)
    return document


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_a_plan_error_or_the_same_plan(tmp_path, seed):
    path, chance = tmp_path / "p.json", random.Random(seed)
    graph = chain("silu", "add", "silu", "mul")
    plan = locked(path, graph, '[[rule]]\nop = "silu"\nm = "1..4"\nuse = "b"\n' + DEFAULTS)
    text = path.read_text()
    for _ in range(100):
        document = json.loads(text)
        for _ in range(chance.randint(1, 2)):
            document = _mutate(chance, document)
        _same_or_refused(path, json.dumps(document), graph, plan)
        at = chance.randrange(len(text))
        _same_or_refused(path, text[:at] + chance.choice('{}[]",:x0\n') + text[at + 1 :], graph, plan)


def _same_or_refused(path, text, graph, plan):
    path.write_text(text)
    try:
        found = read(path, graph)
    except PlanError as error:
        found = str(error)
    if isinstance(found, str):
        assert "\n" not in found, text
    else:
        assert_same_plan(found, plan)


def test_a_lock_holds_no_weights_and_no_paths(tmp_path):
    """It is a file to check in: small, readable, and the same on another machine."""
    locked(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    assert str(tmp_path) not in text
    assert len(text) < 20_000
    assert '"blk.0.attn_q+attn_k+attn_v": "a:fast"' in text


# In another process.

CHOOSE = {
    "op": ["mul_mat", "qkv", "add", "silu", "swiglu", "attention", "rms_norm"],
    "layer": ["0", "1", "0..1"],
    "m": ["1", "2..3", "4..", "8"],
    "node": ["blk.0.*", "*.ffn_up", "logits"],
    "where": ["{ n = 32 }", '{ n = "33..", k = 32 }'],
}
EFFECTS = {"use": ["a", "b", "a:fast", "a:f32"], "max_error": [1e-2], "on_error": ["next", "error"]}
READ_AGAIN = """
import json, sys
from pathlib import Path
import test_lock
from kernelmux.plan.lock import write_lock

for path in map(Path, sys.argv[1:]):
    found, policy = test_lock.read(path), path.with_suffix(".toml").read_text()
    made = test_lock.locked(path.with_suffix(".made"), policy=policy)
    again = path.with_suffix(".again")
    write_lock(found, again)
    print(found == made, again.read_text() == path.read_text() == path.with_suffix(".made").read_text())
"""


def random_policy(chance):
    """Up to four rules of any selectors and effects, and what holds besides."""
    lines = [f"fuse = {chance.choice(['true', 'true', 'false'])}"]
    for _ in range(chance.randrange(5)):
        lines.append("[[rule]]")
        for key, values in CHOOSE.items():
            if chance.random() < 0.3:
                value = chance.choice(values)
                lines.append(f"{key} = {value}" if key == "where" else f'{key} = "{value}"')
        lines.append(f'use = "{chance.choice(EFFECTS["use"])}"')
        lines += [f"max_error = {EFFECTS['max_error'][0]}"] if chance.random() < 0.3 else []
        lines += [f'on_error = "{chance.choice(EFFECTS["on_error"])}"'] if chance.random() < 0.3 else []
    lines += ["[defaults]", f'use = ["{chance.choice("ab")}"]', f'on_error = "{chance.choice(EFFECTS["on_error"])}"']
    lines += ["[kv]", f'format = "{chance.choice(["f32", "bf16"])}"']
    return "\n".join([*lines, ""])


def test_what_one_process_locked_another_reads_equal_in_every_field(tmp_path):
    chance, paths = random.Random(15), []
    for number in range(40):
        policy = random_policy(chance)
        paths.append(tmp_path / f"{number}.json")
        paths[-1].with_suffix(".toml").write_text(policy)
        locked(paths[-1], policy=policy)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", READ_AGAIN, *paths], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["True True"] * len(paths) + [""]
