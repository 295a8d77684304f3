"""What a policy asserts and limits: requirements, copies of weights, the cache's format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelmux
import kernelmux_reference
from fake_backend import FakeKernel, chain, llama_graph, plan_for, whole_backend
from kernelmux.conformance.testing import backend, nmse
from kernelmux.contract import registry
from kernelmux.errors import PlanError, PolicyError
from kernelmux.graph.graph import Builder
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import Model

MAX_ROWS = 8


def planned(policy, graph=None, **backends):
    with registry.isolated(**backends or {"a": whole_backend(), "b": whole_backend()}) as found:
        return plan_for(graph or llama_graph(2), found, policy, max_rows=MAX_ROWS)


def rule(use, **selectors):
    return f'[[rule]]\nuse = "{use}"\n' + "".join(f'{key} = "{value}"\n' for key, value in selectors.items())


def require(kernel, **selectors):
    return f'[[require]]\nkernel = "{kernel}"\n' + "".join(f'{key} = "{value}"\n' for key, value in selectors.items())


# [[require]]


@pytest.mark.parametrize(
    "policy",
    [
        require("a"),
        require("a:f32", op="attention"),
        '[[require]]\nkernel = ["b", "a:f32"]\n',
        rule("b", op="attention") + require("b", op="attention") + require("a", op="add"),
        rule("b", m="1") + require("b", m="1") + require("a", m="2.."),
        require("nobody", op="convert"),
        require("b", layer="7"),
    ],
    ids=["all", "an op", "any of two", "two", "by rows", "no such node", "no such layer"],
)
def test_a_plan_that_keeps_its_requirements_is_made(policy):
    assert planned(policy).schedules


def test_a_broken_requirement_names_file_line_kernel_and_nodes():
    policy = rule("b", op="attention") + "\n" + require("a", op="attention")
    with pytest.raises(PlanError) as caught:
        planned(policy, llama_graph(5))
    message = str(caught.value)
    assert (caught.value.file, caught.value.line) == ("p.toml", 5)
    assert message.startswith("p.toml:5: the policy requires a, but blk.0.attention has b:f32 at up to 8 rows, ")
    assert message.endswith(" and 2 more")
    assert "\n" not in message


@pytest.mark.parametrize("kernel", ["b", "b:f32", "a:fast"])
def test_of_several_requirements_the_broken_one_is_named(kernel):
    with pytest.raises(PlanError, match=rf"^p\.toml:4: the policy requires {kernel}, but blk\.1\.rope\+copy has a:f32"):
        planned(require("a", op="add") + require(kernel, node="blk.1.copy"), a=whole_backend(qkv_rope_copy=None))


BROKEN = {
    "one row": (require("b", m="1"), ""),
    "rows within a bucket": (require("b", m="2..3", op="attention"), ""),
    "rows above a bound": (require("b", m="5.."), rule("b", m="..4")),
    "rows of one bucket of two": (require("a"), rule("b", m="3")),
    "rows at which a rule's kernel declines": (require("b", m="3", op="add"), rule("b:no", m="3", op="add")),
}


@pytest.mark.parametrize(("required", "policy"), BROKEN.values(), ids=BROKEN)
def test_a_requirement_holds_at_every_row_count_that_it_names(required, policy):
    no = [FakeKernel(), kernelmux.contract.hookspecs.Declined("not today", kernel="no")]
    with pytest.raises(PlanError, match="the policy requires"):
        planned(policy + required, a=whole_backend(), b=whole_backend(add=no))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    rules=st.lists(st.tuples(st.sampled_from(["1", "2..3", "3..", "5"]), st.sampled_from("ab")), max_size=3),
    rows=st.sampled_from(["1", "2", "1..4", "3..4", "6..", "8"]),
)
def test_a_requirement_is_broken_if_and_only_if_some_node_has_another_kernel(rules, rows):
    policy = "".join(rule(use, m=m) for m, use in rules)
    low, _, high = rows.partition("..")
    counts = range(int(low), (int(high) if high else MAX_ROWS if ".." in rows else int(low)) + 1)
    plan = planned(policy, chain("silu", "add"))
    kernels = {step.choice.name for m in counts for step in plan.schedule(m, m).steps}
    try:
        planned(policy + require("a", m=rows), chain("silu", "add"))
        broken = False
    except PlanError:
        broken = True
    assert broken == (kernels != {"a:f32"})


PARTS = {"its op": {"op": "mul_mat"}, "its name": {"node": "blk.*.attn_q"}, "its layer": {"op": "rope", "layer": "1"}}


@pytest.mark.parametrize("selectors", PARTS.values(), ids=PARTS)
def test_a_requirement_for_a_node_holds_for_the_one_that_stands_for_it(selectors):
    fused = planned(require("a", **selectors))
    assert "qkv_rope_copy" in {step.node.op for step in fused.schedule(1, 1).steps}
    with pytest.raises(PlanError, match=r"requires b, but blk\.\d\.attn_q\+attn_k\+attn_v\+rope\+copy has a:f32"):
        planned(require("b", **selectors))


def test_a_requirement_for_a_fused_op_speaks_of_fused_nodes_alone():
    assert planned(require("b", op="qkv"), a=whole_backend(qkv_rope_copy=None, qkv=None)).schedules
    with pytest.raises(PlanError, match="requires b, but"):
        planned(require("b", op="qkv"), a=whole_backend(qkv_rope_copy=None))


# Selectors of the graph's formats.


def test_dtype_selects_by_the_format_that_the_graph_states():
    b = Builder("g")
    y = b.value("silu", "y", b.leaf("x", ("m", 8), role="state"), format="bf16")
    graph = b.build(b.value("add", "z", y, y, format="f32"))
    plan = planned(rule("b", dtype="BF16"), graph)
    assert {step.node.name: step.choice.name for step in plan.schedule(1, 1).steps} == {"y": "b:f32", "z": "a:f32"}
    with pytest.raises(PlanError, match="requires a, but y has b:f32"):
        planned(rule("b", dtype="bf16") + require("a", dtype="bf16"), graph)


# [weights] copies


def _linear(*names):
    """mul_mats one after another, each with a weight of its own; the last reads the first's again."""
    b = Builder("g")
    x = b.leaf("x", ("m", 8), role="state")
    weights = [b.leaf(f"{name}.w", (8, 8)) for name in names]
    for name, weight in zip(names, weights, strict=True):
        x = b.value("mul_mat", name, x, weight=(weight,))
    return b.build(b.value("mul_mat", "again", x, weight=weights[:1]))


SMALL, LARGE = FakeKernel("small", packed_bytes=10), FakeKernel("large", packed_bytes=100)
BARE = FakeKernel("bare")
BY_ROWS = rule("a:small", m="1..2") + rule("a:large", m="3..")
ONE = "[weights]\ncopies = 1\n"


def chosen(plan, rows):
    return {step.choice.name for step in plan.schedule(rows, rows).steps}


def test_without_a_limit_every_bucket_packs_what_it_likes_and_the_bytes_are_told():
    plan = planned(BY_ROWS, _linear("p", "q"), a=backend(mul_mat=[SMALL, LARGE]))
    assert (chosen(plan, 1), chosen(plan, 3)) == ({"a:small"}, {"a:large"})
    assert plan.packed_forms == {
        ((f"{name}.w",), f"a/a:{form}"): size for name in "pq" for form, size in (("small", 10), ("large", 100))
    }
    assert (plan.packed_bytes, plan.extra_copy_bytes) == (220, 200)


def test_one_copy_keeps_the_form_that_the_fewest_rows_chose_and_says_so():
    plan = planned(BY_ROWS + ONE, _linear("p", "q"), a=backend(mul_mat=[SMALL, LARGE]))
    assert chosen(plan, 1) == chosen(plan, 3) == chosen(plan, MAX_ROWS) == {"a:small"}
    assert (plan.packed_bytes, plan.extra_copy_bytes) == (20, 0)
    losers = {loser.kernel: loser for loser in plan.schedule(8, 8).steps[0].choice.rejected}
    assert losers["a:large"].kind == "over budget"
    assert losers["a:large"].reason == "p.w has 1 packed forms already, the limit"


def test_two_copies_are_two():
    policy = rule("a:small", m="1..2") + rule("a:large", m="3..4") + rule("a:third", m="5..")
    third = FakeKernel("third", packed_bytes=50)
    plan = planned(policy + "[weights]\ncopies = 2\n", _linear("p"), a=backend(mul_mat=[SMALL, LARGE, third]))
    assert [chosen(plan, rows) for rows in (1, 3)] == [{"a:small"}, {"a:large"}]
    assert chosen(plan, 8) < {"a:small", "a:large"}
    assert plan.packed_bytes == 110


def test_a_kernel_that_packs_nothing_or_shares_a_form_is_not_limited():
    shared = [FakeKernel(name, packed="tiles", packed_bytes=10) for name in ("small", "large")]
    for kernels in (shared, [FakeKernel("small", packed_bytes=10), FakeKernel("large")]):
        plan = planned(BY_ROWS + ONE, _linear("p", "q"), a=backend(mul_mat=kernels))
        assert (chosen(plan, 1), chosen(plan, 3)) == ({"a:small"}, {"a:large"})
        assert plan.packed_bytes == 20


def test_where_only_another_form_would_do_nobody_is_left():
    def by_rows(node, m):
        return SMALL if m <= 2 else LARGE

    with pytest.raises(PlanError, match=r"no kernel takes p .*a:large: p\.w has 1 packed forms already, the limit"):
        planned(ONE, _linear("p"), a=backend(mul_mat=by_rows))
    assert planned(ONE, _linear("p"), a=backend(mul_mat=by_rows), b=backend(mul_mat=BARE)).extra_copy_bytes == 0


@pytest.mark.parametrize("fuse", ["true", "false"])
def test_one_copy_is_one_copy_where_weights_are_packed_together(fuse):
    """Stacked for a fused node, or each by itself: never both."""
    stacking = {op: FakeKernel(packed="tiles", packed_bytes=10) for op in ("mul_mat", "qkv")}
    few = rule("b", m="3..", op="rope") + rule("b", node="blk.1.attn_v", m="5..")
    plan = planned(f"fuse = {fuse}\n{few}{ONE}", a=whole_backend(**stacking, qkv_rope_copy=None), b=whole_backend())
    forms = [weight for (weights, _) in plan.packed_forms for weight in weights]
    assert len(forms) == len(set(forms))
    assert plan.extra_copy_bytes == 0


# [kv] format


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.mark.parametrize(("format", "error"), [("bf16", 1e-4), ("f16", 1e-6)])
@pytest.mark.parametrize("use", ["*=torch:f32,torch:sdpa,torch:rows", "*=reference:f32"], ids=["torch", "reference"])
def test_a_cache_of_half_the_size_gives_nearly_the_logits(model: Model, use: str, format: str, error: float):
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    plain, half = model.plan(use=[use]), model.plan(parse_policy(f'[kv]\nformat = "{format}"\n', "p.toml"), use=[use])
    # Two layers, keys and values, two heads of 16.
    assert (plain.kv_bytes_per_token, half.kv_bytes_per_token) == (2 * 2 * 32 * 4, 2 * 2 * 32 * 2)
    assert half.graph.values["blk.0.copy.k_cache"].format == format
    session = model.session(half, len(ids))
    sequence = session.open()
    found = torch.cat([session.feed(sequence, part, all_logits=True) for part in (ids[:30], ids[30:31], ids[31:])])
    assert 0 < nmse(found, model.forward(ids, plain)) < error
    assert plain.fingerprint != half.fingerprint


def test_a_cache_in_8_bits_has_a_scale_for_each_head_of_a_token(model: Model):
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    policy = parse_policy('[kv]\nformat = "fp8_row"\n', "p.toml")
    small = model.plan(policy, use=["*=torch:f32,torch,reference:f32"])
    # Two layers, keys and values, two heads of 16 with a float32 scale each. torch leaves such caches to the reference.
    assert small.kv_bytes_per_token == 2 * 2 * 2 * (16 + 4)
    session = model.session(small, len(ids))
    sequence = session.open()
    found = torch.cat([session.feed(sequence, part, all_logits=True) for part in (ids[:30], ids[30:31], ids[31:])])
    assert 0 < nmse(found, model.forward(ids, model.plan(use=["*=reference:f32"]))) < 1e-2


def test_caches_of_two_backends_in_one_format_are_one_cache():
    plan = planned(
        rule("b", op="attention") + '[kv]\nformat = "bf16"\n', reference=kernelmux_reference, b=whole_backend()
    )
    assert plan.schedule(1, 1).conversions == 0


@pytest.mark.parametrize("format", ["q8_32", "Q4_0", "i32", "f33", "f64"])
def test_a_format_that_no_cache_can_have_is_refused_with_its_line(format):
    with pytest.raises(
        PolicyError, match=rf"^p\.toml:3: format: unknown cache format '{format}'.*known: auto, bf16, f16, f32"
    ):
        parse_policy(f'\n[kv]\nformat = "{format}"\n', "p.toml")
