"""The policy file: what it may say, what it means, and that every mistake is named with file and line."""

import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_backend import CPU
from kernelmux.contract.device import Device
from kernelmux.errors import PolicyError
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import TensorNode
from kernelmux.policy.grammar import Range
from kernelmux.policy.policy import default_policy, parse_policy, read_policy

GPU = Device("cuda", 0, "H100", (9, 0))

VALID = """\
# Decode reads weights, prefill multiplies.
forbid = ["old", "torch:slow"]

[[rule]]
op = "mul_mat"
m = "1..16"
weight = ["Q4_0", "q4_k"]
device = "cpu"
use = ["torch:int4", "reference"]
max_error = 1e-4

[[rule]]
op = ["add", "mul"]
node = "blk.*.ffn_*"
layer = "0..3"
capability = "9.0"
m = 1
use = "triton"
on_unsupported = "error"

[defaults]
use = ["torch", "reference"]
max_error = 1e-3
"""


def _node(name="n", op="mul_mat", layer=None, weight="Q4_0"):
    weights = () if weight is None else (Value("w", (8, 8), weight),)
    return TensorNode(name=name, op=op, layer=layer, weight=weights, inputs=(Value("x", ("m", 8)),))


def rule(text):
    (parsed,) = parse_policy(f'[[rule]]\nuse = "a"\n{text}\n', "p.toml").document.rule
    return parsed


def test_a_policy_is_read_as_it_is_written():
    policy = parse_policy(VALID, "p.toml")
    first, second = policy.document.rule
    assert policy.document.forbid == ("old", "torch:slow")
    assert (first.op, first.m, first.weight) == (("mul_mat",), Range(1, 16), ("Q4_0", "Q4_K"))
    assert (first.use, first.max_error, first.on_unsupported) == (("torch:int4", "reference"), 1e-4, None)
    assert (second.layer, second.capability, second.m) == (Range(0, 3), (9, 0), Range(1, 1))
    assert (second.use, second.on_unsupported) == (("triton",), "error")
    assert policy.document.defaults.use == ("torch", "reference")
    assert [policy.where(index) for index in (0, 1, None)] == [
        "rule 1 (p.toml:4)",
        "rule 2 (p.toml:12)",
        "defaults (p.toml:21)",
    ]


def test_an_empty_file_is_a_policy():
    assert parse_policy("", "p.toml").match(_node(), 1, CPU) is None


def test_the_default_policy_is_valid():
    document = default_policy().document
    assert (document.rule, document.defaults.use, document.kv.format) == ((), ("auto",), "auto")


@pytest.mark.parametrize(
    ("written", "low", "high"),
    [("5", 5, 5), ('"5"', 5, 5), ('"1..16"', 1, 16), ('"17.."', 17, None), ('"..16"', 0, 16), ('"3..3"', 3, 3)],
)
def test_ranges_include_both_ends(written, low, high):
    for key in ("m", "layer"):
        parsed = getattr(rule(f"{key} = {written}"), key)
        assert [number in parsed for number in range(40)] == [
            low <= number and (high is None or number <= high) for number in range(40)
        ]


MISTAKES = [
    ("use = ", 1, "not TOML"),
    ('[[rule]]\nuse = "a"\nuse = "b"', 3, "not TOML"),
    ('[[rule]\nuse = "a"', 1, "not TOML"),
    ('[[rule]]\nop = "add"\nuse = ["a",\n', "[34]", "not TOML"),
    (
        "\nrules = 1",
        2,
        r"unknown key 'rules' \(did you mean 'rule'\?\); known: defaults, extends, forbid, fuse, kv, require, rule, t",
    ),
    ('[[rule]]\nuse = "a"\n\n[[rule]]\nuse = "a"\nopp = "add"', 6, r"unknown key 'opp' \(did you mean 'op'\?\)"),
    (
        "[defaults]\nmaxerror = 1",
        2,
        r"unknown key 'maxerror' \(did you mean 'max_error'\?\); known: max_error, on_error, use",
    ),
    ('[[rule]]\nuse = "a"\nop = "rmsnorm"', 3, r"op: unknown op 'rmsnorm' \(did you mean 'rms_norm'\?\); known: add"),
    ('[[rule]]\nuse = "a"\nop = ["add", "nul"]', 3, r"op: unknown op 'nul' \(did you mean 'mul'\?\)"),
    ('[[rule]]\nuse = "a"\nweight = "q4k"', 3, r"weight: unknown format 'q4k' \(did you mean 'Q4_K'\?\)"),
    ('[[rule]]\nuse = "a"\nm = "1-16"', 3, r"m: '1-16' is no range: write 5, '1\.\.16', '17\.\.' or '\.\.16'"),
    ('[[rule]]\nuse = "a"\nm = "9..1"', 3, r"m: '9\.\.1' is empty"),
    ('[[rule]]\nuse = "a"\nm = ".."', 3, r"m: '\.\.' is no range"),
    ('[[rule]]\nuse = "a"\nm = -1', 3, "m: -1 is no range"),
    ('[[rule]]\nuse = "a"\nm = true', 3, "m: True is no range"),
    ('[[rule]]\nuse = "a"\nm = 1.5', 3, "m: 1.5 is no range"),
    ('[[rule]]\nuse = "a"\nlayer = "x"', 3, "layer: 'x' is no range"),
    ('[[rule]]\nuse = "a"\nnode = 5', 3, "node: "),
    ('[[rule]]\nuse = "a"\nop = 5', 3, "op: "),
    ('[[rule]]\nuse = "a"\nop = [5]', 3, "op: "),
    ('[[rule]]\nuse = "a"\nweight = [5]', 3, "weight: "),
    ("[[rule]]\nuse = 5", 2, "use: "),
    ("[[rule]]\nuse = [5]", 2, "use: "),
    ("forbid = 5", 1, "forbid: "),
    ('[[rule]]\nuse = "a"\nmax_error = "small"', 3, "max_error: .*not 'small'"),
    ('[[rule]]\nuse = "a"\nmax_error = 0', 3, "max_error: "),
    ('[[rule]]\nuse = "a"\nmax_error = true', 3, "max_error: "),
    ('[[rule]]\nuse = "a"\nmax_error = nan', 3, "max_error: "),
    ('[[rule]]\nuse = "a"\ndevice = "gpu"', 3, "device: unknown kind of device 'gpu' .*known: cpu, cuda, rocm"),
    ('[[rule]]\nuse = "a"\ncapability = "90"', 3, r"capability: '90' is no compute capability: write it as '9\.0'"),
    ('[[rule]]\nuse = "a"\nwhere = { n = true }', 3, "where: n is never True: it is a whole number from 1"),
    ('[[rule]]\nuse = "a"\nwhere = { n = [64, -5] }', 3, "where: n is never -5: it is a whole number from 1"),
    ('[[rule]]\nuse = "a"\nwhere = { head_dim = 1.5 }', 3, "where: head_dim is never 1.5: it is a whole number"),
    ('[[rule]]\nuse = "a"\nwhere = { k = "0..0" }', 3, "where: k is never 0: it is a whole number from 1"),
    ('[[rule]]\nuse = "a"\nwhere = { weight_format = "4.." }', 3, "where: weight_format is never 4: it is a name"),
    ('[[rule]]\nuse = "a"\nwhere = { weight_format = "q4k" }', 3, "where: unknown format 'q4k' .*did you mean 'Q4_K'"),
    ('[[rule]]\nuse = "a"\nwhere = { bias = 1 }', 3, "where: bias is never 1: it is true or false"),
    ('[[rule]]\nuse = "a"\nwhere = { rotation = "x" }', 3, "where: rotation is never 'x': it is nothing that can be"),
    ('[[rule]]\nuse = "a"\nwhere = { m = "1..8" }', 3, "where: m is a selector .*write m beside where, as m = '1..8'"),
    ('[[rule]]\nuse = "a"\nwhere.m = 1', 3, "where: m is a selector .*write m beside where, as m = 1"),
    ('[[rule]]\nuse = "a"\non_unsupported = "stop"', 3, "on_unsupported: .*'next'.*'error'"),
    ('[[rule]]\nuse = "torch int4"', 2, "use: 'torch int4' is no kernel: write 'backend' or 'backend:kernel'"),
    ('[[rule]]\nuse = "torch:"', 2, "use: 'torch:' is no kernel"),
    ('[[rule]]\nuse = "parts"', 2, "use: 'parts' is for rules of fused ops alone .*which this rule does not name"),
    ('[[rule]]\nuse = "parts"\nop = ["qkv", "add"]', 2, r"use: 'parts' is for .*alone \(.*qkv.*\), not add"),
    ('[[rule]]\nop = "qkv"\nuse = ["parts", "a"]', 3, "use: 'parts' comes last: after it nobody is asked"),
    ('[defaults]\nuse = ["a", "parts"]', 2, "use: 'parts' is for rules of fused ops alone: write a .*rule"),
    ('tuned_for = "cuda H200"', 1, r"tuned_for: 'cuda H200' describes no device: .*as in 'cuda sm_90 NVIDIA H200'"),
    ('fuse = true\ntuned_for = "H200"', 2, "tuned_for: unknown device 'H200'; known: cpu, cuda"),
    ("tuned_for = 90", 1, "tuned_for: a class of devices is needed, as 'cuda sm_90 NVIDIA H200', not '90'"),
    ('forbid = ["torch:int4", ":x"]', 1, "forbid: ':x' is no kernel"),
    ('[[rule]]\nuse = "a"\n[[rule]]\nop = "add"\n', 3, "rule lacks the key 'use'"),
    ("rule = 5", 1, "rule: "),
    ("defaults = 5", 1, "defaults: "),
    ('# a\u2028line?\n# \x85\n[[rule]]\nuse = "a"\nopp = 1', 5, "unknown key 'opp'"),
    ('[[rule]]\nuse = "a"\nm = ' + "1" * 5000, 3, "."),
    ("m = " + "[" * 5000, 1, "not TOML"),
    ('[[rule]]\nusse = "a"\nop = "matmul"', 2, r"unknown key 'usse'.*; and 1 more: kernelmux policy check p\.toml$"),
]


@pytest.mark.parametrize(("text", "line", "message"), MISTAKES, ids=[repr(text)[:50] for text, *_ in MISTAKES])
def test_a_mistake_names_file_line_and_what_would_work(text, line, message):
    with pytest.raises(PolicyError, match=rf"^p\.toml:{line}: .*{message}") as caught:
        parse_policy(text, "p.toml")
    error = caught.value
    assert str(error).startswith(f"{error.file}:{error.line}: ")


@pytest.mark.parametrize(
    "where",
    ["layer = 0", 'layer = "0..3"', 'k = "0.."', "epsilon = 1", "bias = true", "n = [4096, 1]", 'n = "..5"'],
)
def test_what_a_hook_may_be_told_is_no_mistake(where):
    assert rule(f"where = {{ {where} }}").where


def test_formats_in_where_are_spelt_as_formats_are():
    assert rule('where = { weight_format = ["q4_k", "BF16"] }').where == {"weight_format": ("Q4_K", "bf16")}


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PolicyError, match=r"none\.toml.*No such file") as caught:
        read_policy(tmp_path / "none.toml")
    assert (caught.value.file, caught.value.line) == (str(tmp_path / "none.toml"), None)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match=r"binary\.toml.*UTF-8"):
        read_policy(tmp_path / "binary.toml")


def test_a_file_is_called_by_its_path(tmp_path):
    (tmp_path / "p.toml").write_text("oops = 1")
    with pytest.raises(PolicyError, match=re.escape(f"{tmp_path / 'p.toml'}:1: unknown key")):
        read_policy(tmp_path / "p.toml")


# Matching: the first rule of which every selector holds.

SELECTORS = {
    "op": st.sampled_from([["mul_mat"], ["add"], ["add", "mul_mat"]]),
    "node": st.sampled_from([["blk.*"], ["*.q"], ["blk.1.?", "out"]]),
    "layer": st.sampled_from([(0, 0), (1, None), (0, 1)]),
    "m": st.sampled_from([(1, 1), (2, None), (0, 3)]),
    "weight": st.sampled_from([["Q4_0"], ["f32", "Q4_0"]]),
    "device": st.sampled_from(["cpu", "cuda"]),
    "capability": st.sampled_from([(8, 0), (9, 0), (10, 0)]),
}
rules = st.lists(st.fixed_dictionaries({}, optional=SELECTORS), max_size=4)
nodes = st.builds(
    _node,
    name=st.sampled_from(["blk.0.q", "blk.1.q", "blk.1.v", "out"]),
    op=st.sampled_from(["mul_mat", "add", "silu"]),
    layer=st.sampled_from([None, 0, 1, 2]),
    weight=st.sampled_from([None, "f32", "Q4_0", "Q6_K"]),
)


def _written(selector, value):
    if selector in ("layer", "m"):
        low, high = value
        return f'"{low}..{"" if high is None else high}"'
    return f'"{value[0]}.{value[1]}"' if selector == "capability" else repr(value)


def _holds(selector, value, node, rows, device):
    number = rows if selector == "m" else node.layer
    formats = {weight.format for weight in node.weight}
    return {
        "op": lambda: node.op in value,
        "node": lambda: any(fnmatchcase(node.name, pattern) for pattern in value),
        "layer": lambda: number is not None and number >= value[0] and (value[1] is None or number <= value[1]),
        "m": lambda: number >= value[0] and (value[1] is None or number <= value[1]),
        "weight": lambda: bool(formats) and formats <= set(value),
        "device": lambda: device.kind == value,
        "capability": lambda: device.capability is not None and device.capability >= value,
    }[selector]()


@settings(derandomize=True, deadline=None, max_examples=300)
@given(rules=rules, node=nodes, rows=st.integers(1, 5), device=st.sampled_from([CPU, GPU]))
def test_the_first_rule_of_which_every_selector_holds_matches(rules, node, rows, device):
    text = "".join(
        '[[rule]]\nuse = "a"\n' + "".join(f"{key} = {_written(key, value)}\n" for key, value in selectors.items())
        for selectors in rules
    )
    expected = next(
        (
            index
            for index, selectors in enumerate(rules)
            if all(_holds(key, value, node, rows, device) for key, value in selectors.items())
        ),
        None,
    )
    assert parse_policy(text, "p.toml").match(node, rows, device) == expected


# --use.


def test_use_outranks_the_file_and_the_last_one_wins():
    policy = parse_policy(VALID, "p.toml").with_use(["*=reference", "mul_mat=torch:f32", "mul_mat=torch:bf16,cupy"])
    matched = policy.match(_node(), 1, CPU)
    assert policy.document.rule[matched].use == ("torch:bf16", "cupy")
    assert policy.where(matched) == "--use mul_mat=torch:bf16,cupy"
    assert policy.document.rule[policy.match(_node(op="silu"), 1, CPU)].use == ("reference",)


def test_the_files_rules_keep_their_numbers_beside_use():
    policy = parse_policy(VALID, "p.toml").with_use(["silu=torch"])
    assert policy.where(policy.match(_node(), 1, CPU)) == "rule 1 (p.toml:4)"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("mul_mat", "write OP=KERNEL, as mul_mat=torch:int4"),
        ("=torch", "write OP=KERNEL"),
        ("mul_mat=", "write OP=KERNEL"),
        ("mulmat=torch", r"unknown op 'mulmat' \(did you mean 'mul_mat'\?\)"),
        ("mul_mat=torch int4", "'torch int4' is no kernel"),
    ],
)
def test_a_mistake_in_use_is_named(option, message):
    with pytest.raises(PolicyError, match=rf"^--use {re.escape(option)}: .*{message}"):
        parse_policy("", "p.toml").with_use([option])


def test_one_table_where_many_are_meant_says_how_to_write_it():
    with pytest.raises(PolicyError, match=r"p.toml:1: rule: \[rule\] is one table: write \[\[rule\]\]"):
        parse_policy('[rule]\nop = "mul_mat"\nuse = "a"\n', "p.toml")
