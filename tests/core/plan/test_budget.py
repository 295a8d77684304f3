"""What a kernel adds to the error, what `auto` lets it add, and the policy under which next to nothing is added."""

import pytest

from fake_backend import FakeKernel, llama_graph, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.device import described_device
from kernelmux.graph.formats import lookup
from kernelmux.graph.graph import Builder
from kernelmux.plan.budget import added_error, default_budget, less_exact, may_overflow
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import EXACT, parse_policy, shipped_policy
from kernelmux.run.model import load_random

BF16 = lookup("bf16").rounding


def node_of(graph):
    return graph.ops[-1]


def product(weight):
    b = Builder("product")
    x = b.leaf("x", ("m", 256), role="state")
    return node_of(b.build(b.value("mul_mat", "y", x, weight=(b.leaf("w", (64, 256), weight),))))


@pytest.mark.parametrize(
    ("takes", "emits", "added"),
    [
        (None, None, 0.0),
        (["bf16", "f32"], ["f32", "bf16"], 0.0),
        (["bf16"], None, BF16),
        (None, ["bf16"], BF16),
        (["bf16"], ["bf16"], 2 * BF16),
        (["bf16", "f16"], None, lookup("f16").rounding),
    ],
    ids=["as stated", "float32 too", "reads", "writes", "both", "the best of its formats"],
)
def test_what_it_reads_or_writes_in_narrow_formats_alone_is_added_to_its_own_bound(takes, emits, added):
    kernel = FakeKernel(precision=1e-9, takes=takes, emits=emits)
    assert added_error(kernel, node_of(silu_graph())) == pytest.approx(1e-9 + added, rel=1e-6)


def test_each_input_adds_and_of_outputs_the_worst():
    b = Builder("two")
    x, y = (b.leaf(name, ("m", 8), role="state") for name in "xy")
    add = node_of(b.build(b.value("add", "z", x, y)))
    narrow = FakeKernel(precision=1e-9, takes=["bf16"], emits=["bf16"])
    assert added_error(narrow, add) == pytest.approx(1e-9 + 3 * BF16, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "budget"),
    [("f32", 1e-6), ("bf16", 8e-5), ("f16", 8e-5), ("Q8_0", 2e-4), ("Q6_K", 4e-4), ("Q5_K", 2e-3), ("Q4_K", 7e-3)],
)
def test_a_kernel_may_add_what_its_weights_storage_has(weight, budget):
    assert default_budget(product(weight)) == budget


def test_float16_alone_may_overflow_where_the_weights_do_not_end_there():
    half = FakeKernel(takes=["f16"])
    assert may_overflow(half, product("bf16"))
    assert not may_overflow(half, product("f16"))
    assert not may_overflow(FakeKernel(takes=["f16", "f32"]), product("bf16"))


@pytest.mark.parametrize("options", [{"takes": ["bf16"]}, {"emits": ["bf16"]}, {"precision": 2e-9}, {"takes": ["f16"]}])
def test_under_a_stated_budget_auto_counts_what_is_lost_in_narrow_formats_too(options):
    narrow = FakeKernel("narrow", reading=0.9, **options)
    a = backend(silu=[narrow, FakeKernel("wide", reading=0.1)], convert=FakeKernel())
    with registry.isolated(a=a) as found:
        plan = plan_for(silu_graph(), found, '[defaults]\nuse = "auto"\nmax_error = 1e-9\n')
    (step,) = plan.schedule(1, 1).steps
    assert step.choice.name == "a:wide"
    assert [(why.kernel, why.kind) for why in step.choice.rejected] == [("a:narrow", "over budget")]


def exact_plan(policy=None, **backends):
    with registry.isolated(**backends) as found:
        return make_plan(llama_graph(2), policy or shipped_policy(EXACT), found, described_device("cpu"), 8)


def test_the_exact_policy_takes_the_fastest_of_what_adds_next_to_nothing():
    rough = FakeKernel("rough", precision=5e-5, reading=0.9)
    narrow = FakeKernel("narrow", takes=["bf16"], emits=["bf16"], reading=0.9)
    slow, fast = FakeKernel("slow", reading=0.1), FakeKernel("fast", precision=1e-9, reading=0.5)
    plan = exact_plan(a=whole_backend(mul_mat=[rough, narrow, slow, fast]))
    assert {step.choice.name for step in plan.steps if step.node.op == "mul_mat"} == {"a:fast"}


def test_a_policy_that_extends_it_has_its_rules_before_it_and_the_budget_for_them_too():
    rough, slow = FakeKernel("rough", precision=5e-5), FakeKernel("slow", reading=0.1)
    a = whole_backend(mul_mat=[rough, FakeKernel("fast"), slow])
    rule = 'extends = "exact"\n[[rule]]\nop = "mul_mat"\nuse = ["a:rough", "a:slow"]\n'

    def taken(text):
        plan = exact_plan(parse_policy(text, "p.toml"), a=a)
        return {step.choice.name for step in plan.steps if step.node.op == "mul_mat"}

    assert taken(rule) == {"a:slow"}
    assert taken(f"{rule}max_error = 1e-3\n") == {"a:rough"}


@pytest.mark.parametrize("words", ["cpu", "cpu amx", "cuda sm_90 NVIDIA H200", "cuda sm_80 NVIDIA A100"])
@pytest.mark.parametrize("model", ["smollm2-135m:Q4_1", "llama-1b:bf16"])
def test_an_exact_plan_of_what_is_installed_stores_every_value_in_float32(words, model):
    opened = load_random(model)
    plan = opened.plan(EXACT, device=described_device(words))
    assert {step.choice.asked for step in plan.steps} == {"auto"}
    assert max(added_error(step.choice.kernel, step.node) for step in plan.steps) <= 1e-9
    assert {value.format for step in plan.steps for value in (*step.node.inputs, *step.node.outputs)} <= {"f32", "i32"}


class Widening(FakeKernel):
    rounds_to = "bf16"


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (FakeKernel("exact"), []),
        (FakeKernel("rough", precision=1.0), ["mul_mat a:rough"]),
        (FakeKernel("rounding", emits=["bf16"], precision=0.0), ["mul_mat a:rounding"]),
        (Widening("widening"), ["mul_mat a:widening"]),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_less_exact_is_what_errs_more_than_the_default_takes_or_rounds_logits(kernel, said):
    b = Builder("one")
    x = b.leaf("x", ("m", 32), role="state")
    graph = b.build(b.value("mul_mat", "logits", x, weight=(b.leaf("w", (64, 32), "bf16"),)))
    with registry.isolated(a=whole_backend(mul_mat=kernel)) as found:
        plan = plan_for(graph, found, f'[defaults]\nuse = ["a:{kernel.name}"]\n')
    assert less_exact(plan, 4, 4) == said
