"""`kernelmux bisect`: who is to blame, the policy that works around it, the cases that show it; and exit codes."""

from __future__ import annotations

import json

import pytest

import kernelmux_reference
import kernelmux_torch
from command import call_command
from fake_backend import FakeKernel, compute, whole_backend
from kernelmux.contract import registry
from kernelmux.graph.ops import OPS

POLICY = 'fuse = false\n[defaults]\nuse = ["faulty"]\n'
WRONG = "blk.1.ffn_gate"


@pytest.fixture
def faulty():
    """A backend that is wrong at one node; the reference and torch beside it."""

    def work(node, tensors):
        compute(node, tensors)
        if node.op == "mul_mat" and node.name == WRONG:
            tensors.outputs[0].mul_(1.5)

    backend = whole_backend(**{op: FakeKernel(work=work) for op in OPS})
    with registry.isolated(faulty=backend, reference=kernelmux_reference, torch=kernelmux_torch):
        yield


def test_who_is_to_blame_is_named_and_a_policy_works_around_it(tiny, tmp_path, faulty):
    policy, mended, cases = tmp_path / "p.toml", tmp_path / "mended.toml", tmp_path / "cases.json"
    policy.write_text(POLICY)
    asked = ["bisect", tiny, "--policy", policy, "-p", "Hello there, you.", "--decode", 2]
    done = call_command(*asked, "--write-policy", mended, "--write-cases", cases)
    assert done.code == 1, done.err
    assert f"faulty:f32 at {WRONG} (mul_mat), 1 row\n" in done.out
    assert f"faulty:f32 at {WRONG} (mul_mat), 2 to 512 rows" in done.out
    assert done.out.count("faulty:f32 at") == 2
    assert f"{cases}: kernelmux check --kernel faulty:f32 --cases {cases} shows" in done.out
    assert mended.read_text().startswith("fuse = false\n\n[[rule]]\n")
    again = call_command("bisect", tiny, "--policy", mended, "-p", "Hello there, you.", "--decode", 2)
    assert (again.code, again.out.startswith("nothing is wrong: error")) == (0, True)
    captured = json.loads(cases.read_text())["cases"]
    assert {case["graph"].partition("-")[0] for case in captured} == {"captured/mul_mat"}
    assert sorted(rows_of(case) for case in captured) == [1, 10]


def rows_of(case):
    """Of the activations, which a case has among the leaves of its graph."""
    (x,) = [node["outputs"][0] for node in case["nodes"] if node["op"] == "leaf" and node["role"] == "state"]
    return x["shape"][0]


def test_the_cases_are_of_the_row_counts_to_blame(tiny, tmp_path):
    """A kernel that is wrong in decoding alone: not one of the prompt's launches is a case."""

    def work(node, tensors):
        compute(node, tensors)
        if node.name == WRONG and len(tensors.outputs[0]) == 1:
            tensors.outputs[0].mul_(1.5)

    cases = tmp_path / "cases.json"
    (tmp_path / "p.toml").write_text(POLICY)
    with registry.isolated(
        faulty=whole_backend(**{op: FakeKernel(work=work) for op in OPS}), reference=kernelmux_reference
    ):
        done = call_command(
            *("bisect", tiny, "--policy", tmp_path / "p.toml", "--ids", "1,2,3,4,5", "--decode", 2),
            *("--write-cases", cases),
        )
    assert done.code == 1, done.err
    assert [rows_of(case) for case in json.loads(cases.read_text())["cases"]] == [1]


def test_json_names_them(tiny, tmp_path, faulty):
    (tmp_path / "p.toml").write_text(POLICY)
    done = call_command("bisect", tiny, "--policy", tmp_path / "p.toml", "--ids", "1,2,3,4,5", "--decode", 0, "--json")
    document = json.loads(done.out)
    assert done.code == 1
    (blamed,) = document["blamed"]
    assert blamed == {"node": WRONG, "op": "mul_mat", "kernel": "faulty:f32", "rows": [1, 512]}
    assert document["error"] > document["bound"] >= document["healed"]


def test_where_nothing_is_wrong_nothing_is_written(tiny, tmp_path):
    done = call_command("bisect", tiny, "--use", "*=torch", "--ids", "1 2 3", "--write-policy", tmp_path / "p.toml")
    assert done.code == 0, done.err
    assert f"{tmp_path / 'p.toml'}: not written, for nobody is to blame" in done.out
    assert not (tmp_path / "p.toml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ids", "1,x"], "token ids, with commas between them"),
        (["--ids", "999999"], "is not in the vocabulary"),
        (["--ids", "1", "-p", "a"], "they stand in place of --prompt"),
        (["--ids", "1", "--write-policy", "no/such/p.toml"], "there is no folder no/such to write p.toml to"),
    ],
)
def test_what_cannot_be_run_is_one_line(tiny, words, said):
    done = call_command("bisect", tiny, *words)
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize("on_error", ["error", "next"])
def test_a_kernel_that_raises_is_said_to(tiny, tmp_path, on_error):
    """An error without end read as if it made NaN; and who took its place was not told."""

    def work(node, tensors):
        if node.name == WRONG:
            raise OverflowError("out of tiles")
        compute(node, tensors)

    policy = 'fuse = false\n[defaults]\nuse = ["faulty", "reference"]\non_error = "{}"\n'
    (tmp_path / "p.toml").write_text(policy.format(on_error))
    faulty = whole_backend(**{op: FakeKernel(work=work) for op in OPS})
    with registry.isolated(faulty=faulty, reference=kernelmux_reference):
        asked = ("bisect", tiny, "--policy", tmp_path / "p.toml", "--ids", "1,2,3,4,5", "--decode", 0)
        done, told = call_command(*asked), json.loads(call_command(*asked, "--json").out)
        compared = call_command("compare", tiny, "reference", tmp_path / "p.toml", "--nodes", 0)
    said = f"faulty:f32 raised at {WRONG}: OverflowError: out of tiles"
    assert said in done.out
    if on_error == "error":
        assert done.code == 1
        assert said in told["raised"]
    else:
        assert done.code == 0
        assert "reference:f32 runs instead" in done.out
        assert [each["node"] for each in told["replaced"]] == [WRONG]
        assert said in compared.err
