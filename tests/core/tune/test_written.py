"""A policy that is written from plans makes plans of just these choices, and says what each took."""

from __future__ import annotations

import pytest

from kernelmux.contract.device import described_device
from kernelmux.measure.predict import Prediction
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import load_random
from kernelmux.tune.written import Section, write_rules

pytestmark = pytest.mark.slow

H200 = described_device("cuda sm_90 NVIDIA H200")
BASE = 'extends = "default"\n'
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 65, 100, 128, 129, 512)


def kernels(plan, rows):
    return {step.node.name: step.choice.name for step in plan.schedule(rows, rows).steps}


def planned(model, policy="", use=()):
    return model.plan(parse_policy(policy or BASE, "p.toml"), device=H200, use=use)


def written(model, *sections, told=lambda node, rows: {}):
    graph = model.graph.with_cache_format("bf16")
    return BASE + write_rules(graph, sections, told, (1, 8, 512)) + "\n"


@pytest.mark.parametrize("use", [(), ("*=torch",), ("*=cupy",), ("*=triton",)])
@pytest.mark.parametrize("format", ["Q4_K_M", "Q8_0", "bf16"])
def test_a_plan_by_the_policy_that_was_written_from_a_plan_is_that_plan(format, use):
    model = load_random(f"smollm2-135m:{format}")
    plan = planned(model, use=use)
    again = planned(model, written(model, Section(512, plan)))
    assert [kernels(again, rows) for rows in ROWS] == [kernels(plan, rows) for rows in ROWS]


def test_of_several_plans_each_holds_up_to_its_rows():
    model = load_random("tiny:Q4_1")
    few, some, many = planned(model, use=("*=cupy",)), planned(model), planned(model, use=("*=torch",))
    again = planned(model, written(model, Section(3, few), Section(99, some), Section(512, many)))
    for rows in ROWS:
        expected = few if rows <= 3 else some if rows <= 99 else many
        assert kernels(again, rows) == kernels(expected, rows), rows


def test_an_op_with_one_kernel_at_all_rows_is_one_rule_with_no_other_key():
    model = load_random("tiny:bf16")
    plan = planned(model, use=("*=torch",))
    rules = written(model, Section(512, plan)).split("[[rule]]")[1:]
    taken = {}
    for step in plan.steps:
        taken.setdefault(step.node.op, set()).add(step.choice.name)
    single = [op for op, names in taken.items() if len(names) == 1 and op in {node.op for node in model.graph.ops}]
    assert "rms_norm" in single
    for op in single:
        (rule,) = [rule for rule in rules if f'op = "{op}"' in rule]
        assert "m = " not in rule
        assert "node = " not in rule
        assert "weight = " not in rule


def test_what_is_never_fused_is_said_once():
    model = load_random("tiny:bf16")
    text = written(model, Section(512, planned(model, use=("*=reference",))))
    assert text.count("# Faster as several nodes.") == 1


def test_a_rule_tells_its_kernels_time_and_the_next_best():
    model = load_random("tiny:bf16")
    us = {"torch:bf16": 4.0, "triton:bf16": 5.25, "cupy:bf16": 39.0, "torch:f16": 41.0}
    times = {name: Prediction(each, "", declared=name == "cupy:bf16") for name, each in us.items()}
    text = written(model, Section(512, planned(model, use=("*=torch",))), told=lambda node, rows: times)
    assert "# 1 row: 4 us; triton:bf16 5.25 us; cupy:bf16 39 us declared\n" in text
    assert "# 512 rows: 4 us; " in text
