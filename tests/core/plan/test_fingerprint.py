"""A plan's fingerprint: the same in any process, another with any choice, and nothing to do with how rules are written.

What changes one: a kernel at whatever row count, its version, a fusion, a conversion, a bucket's end, the cache's
format, the graph, the device's class, what follows where a kernel raises. What does not: where a rule stands, its
reason, a budget that decided nothing. A rule that chooses for some rows what was chosen anyway ends a bucket there, as
reasons differ.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command import TIMEOUT
from fake_backend import CPU, FakeKernel, chain, llama_graph, plan_for, whole_backend
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.graph.ops import OPS
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import parse_policy

POLICY = """\
[[rule]]
op = ["mul_mat", "qkv"]
m = "1..3"
use = "a:fast"

[[rule]]
op = "attention"
use = "b"

[defaults]
use = ["a", "b"]
"""


def backends():
    both = [FakeKernel(), FakeKernel("fast", takes=["bf16"], precision=1e-4)]
    return {"a": whole_backend(**dict.fromkeys(OPS, both)), "b": whole_backend()}


def planned(policy="", graph=None, max_rows=8, **others):
    with registry.isolated(**{**backends(), **others}) as found:
        return plan_for(graph or llama_graph(2), found, policy, max_rows=max_rows)


IN_ANOTHER_PROCESS = """
import test_fingerprint
print(test_fingerprint.planned(test_fingerprint.POLICY).fingerprint)
"""


@pytest.mark.parametrize("seed", ["0", *(pytest.param(seed, marks=pytest.mark.slow) for seed in ("1", "4711"))])
def test_another_process_with_another_hash_seed_gives_the_same(seed):
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
    run = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    result = subprocess.run(run, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == planned(POLICY).fingerprint


def test_it_is_short_and_stays_the_same_on_a_plan():
    plan = planned(POLICY)
    assert len(plan.fingerprint) == 16
    assert plan.fingerprint == plan.fingerprint == planned(POLICY).fingerprint


# Rules.

ROWS = range(1, 9)
selectors = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from(["silu", "mul_mat", "add", "qkv", "swiglu", "attention"]),
        "layer": st.sampled_from(["0", "1", "0..1", "5"]),
        "m": st.sampled_from(["1", "2..3", "3", "4..", "8", "9.."]),
        "node": st.sampled_from(["blk.0.*", "*.ffn_up", "logits"]),
        "device": st.sampled_from(["cpu", "cuda"]),
    },
)
effects = st.fixed_dictionaries(
    {"use": st.sampled_from(["a", "b", "a:fast", "a:f32"])},
    optional={"max_error": st.sampled_from([1e-8, 1e-2]), "on_error": st.sampled_from(["next", "error"])},
)
rules = st.builds(lambda which, what: {**which, **what}, selectors, effects)
heads = st.tuples(st.sampled_from(["true", "true", "false"]), st.sampled_from("ab"), st.sampled_from(["f32", "bf16"]))


def written(rules, head=("true", "a", "f32")):
    """A policy's text: its rules, and whether it fuses, its default backend, its cache's format."""
    lines = [f"fuse = {head[0]}"]
    for rule in rules:
        lines += ["[[rule]]", *(f'{key} = "{v}"' if isinstance(v, str) else f"{key} = {v}" for key, v in rule.items())]
    return "\n".join([*lines, "[defaults]", f'use = "{head[1]}"', "[kv]", f'format = "{head[2]}"', ""])


def choices(plan):
    """What every row count runs: nodes with their kernels, the formats of their values, and what a fault does."""
    return {
        (m, outs): [(step.node, step.choice.name, step.choice.on_error) for step in plan.schedule(m, outs).steps]
        for m in ROWS
        for outs in {1, m}
    }


GRAPH = llama_graph(2)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(first=st.lists(rules, max_size=3), heads=st.tuples(heads, heads), second=st.lists(rules, max_size=3))
def test_policies_of_different_choices_have_different_fingerprints(first, heads, second):
    ours, theirs = planned(written(first, heads[0]), GRAPH), planned(written(second, heads[1]), GRAPH)
    same = (choices(ours), ours.buckets) == (choices(theirs), theirs.buckets)
    assert (ours.fingerprint == theirs.fingerprint) == same


@settings(derandomize=True, deadline=None, max_examples=40)
@given(policy=st.lists(rules, max_size=3), extra=rules, at=st.integers(0, 3), data=st.data())
def test_one_rule_changed_changes_it_if_and_only_if_it_changes_a_choice_or_a_bucket(policy, extra, at, data):
    """Added, left out, or moved."""
    changed = [*policy[:at], extra, *policy[at:]]
    if policy and data.draw(st.booleans()):
        changed = data.draw(st.permutations(policy)) if data.draw(st.booleans()) else policy[1:]
    before, after = planned(written(policy), GRAPH), planned(written(changed), GRAPH)
    same = (choices(before), before.buckets) == (choices(after), after.buckets)
    assert (before.fingerprint == after.fingerprint) == same


# One thing at a time.

SAME = {
    "a comment": (POLICY, f"# why\n{POLICY}"),
    "another name of the file's rules": (POLICY, POLICY.replace('use = "b"', 'use = ["b", "a"]')),
    "a rule for no node": (POLICY, f'[[rule]]\nlayer = "7.."\nuse = "b"\n\n{POLICY}'),
    "a rule for what was chosen anyway": (POLICY, f'{POLICY}\n[[rule]]\nop = "add"\nuse = "a"\n'),
    "a budget that all keep": (POLICY, f"{POLICY}max_error = 1e-2\n"),
    "a requirement that holds": (POLICY, f'{POLICY}\n[[require]]\nop = "attention"\nkernel = "b"\n'),
    "a limit that is kept": (POLICY, f"{POLICY}\n[weights]\ncopies = 9\n"),
    "a kernel that is forbidden and was not chosen": (POLICY, f'forbid = "c"\n\n{POLICY}'),
    "by op and by name": (
        '[[rule]]\nop = "silu"\nuse = "b"\n',
        '[[rule]]\nnode = "*.ffn_silu"\nm = "1.."\nuse = "b"\n',
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), SAME.values(), ids=SAME)
def test_what_changes_no_choice_changes_no_fingerprint(ours, theirs):
    known = {"c": whole_backend()}
    assert planned(ours, **known).fingerprint == planned(theirs, **known).fingerprint


OTHER = {
    "a kernel at one row": {"policy": f'[[rule]]\nop = "silu"\nm = "1"\nuse = "b"\n\n{POLICY}'},
    "a kernel of the rows with logits": {"policy": f'[[rule]]\nnode = "logits"\nm = "2"\nuse = "b"\n\n{POLICY}'},
    "a fusion": {"policy": f"fuse = false\n\n{POLICY}"},
    "the cache": {"policy": f'{POLICY}\n[kv]\nformat = "bf16"\n'},
    "a bucket's end": {"policy": POLICY.replace("1..3", "1..4")},
    "the most rows": {"max_rows": 16},
    "a bucket of its own for the same kernel": {
        "policy": f'[[rule]]\nop = "attention"\nm = "1"\nuse = "b"\n\n{POLICY}'
    },
    "a layer more": {"graph": llama_graph(3)},
    "the weights' format": {"graph": llama_graph(2, weight="bf16")},
    "a version": {"b": whole_backend(attention=FakeKernel(version="2"))},
    "what to do where a kernel raises": {"policy": f'{POLICY}on_error = "next"\n'},
    "a conversion": {"b": whole_backend(attention=FakeKernel(emits=["bf16"]))},
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_whatever_changes_a_choice_changes_it(change):
    assert planned(**{"policy": POLICY, **change}).fingerprint != planned(POLICY).fingerprint


def test_it_is_that_of_a_class_of_devices():
    devices = [CPU, *(Device("cuda", index, name, (9, 0)) for index, name in ((0, "H100"), (1, "H100"), (0, "H200")))]
    with registry.isolated(**backends()) as found:
        prints = [make_plan(chain("silu"), parse_policy("", "p"), found, d, 8).fingerprint for d in devices]
    assert prints[1] == prints[2]
    assert len(set(prints)) == 3
