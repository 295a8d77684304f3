"""Rules written as text are read as the same rules, before those of the file that they were put into."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.graph.domain import Range
from kernelmux.policy.grammar import Rule
from kernelmux.policy.policy import parse_policy
from kernelmux.policy.text import with_rules

TEXTS = [
    "",
    'fuse = false\n[defaults]\nuse = ["torch"]\n',
    '# Mine.\nforbid = ["cupy"]\n\n[[rule]]\nop = "add"\nuse = ["torch"]\n\n[kv]\nformat = "bf16"\n',
    'extends = "default"\n',
]
RULES = st.builds(
    Rule,
    use=st.sampled_from([("reference",), ("torch:f32", "torch"), ("auto",)]),
    op=st.sampled_from([None, ("mul_mat",), ("rope", "add")]),
    node=st.none() | st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3).map(tuple),
    m=st.none() | st.integers(1, 9).map(lambda low: Range(low, low + 8)),
    layer=st.sampled_from([None, Range(0, 3), Range(2, 2)]),
    max_error=st.sampled_from([None, 1e-4]),
    on_error=st.sampled_from([None, "next"]),
    where=st.sampled_from([None, {"n": "4096..", "head_dim": [64, 128]}]),
)


@pytest.mark.parametrize("text", TEXTS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(rules=st.lists(RULES, max_size=3))
def test_rules_come_back_before_the_file_s_own(text, rules):
    before, found = parse_policy(text, "p.toml").document, parse_policy(with_rules(rules, text), "p.toml").document
    assert found.rule == (*rules, *before.rule)
    assert found.model_copy(update={"rule": ()}) == before.model_copy(update={"rule": ()})
