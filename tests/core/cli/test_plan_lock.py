"""`kernelmux plan --lock`, `run --plan`, `plan --why` and `plan --diff`, on small models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from command import Result, assert_one_line_error, call_command, expanded, read_table
from tiny_model import write_tiny_llama

SMALL = '[[rule]]\nop = "mul_mat"\nm = "1..8"\nuse = "torch:int4"\n\n[defaults]\nuse = ["torch:f32", "torch"]\n'
WHOLE = '[defaults]\nuse = ["reference:f32"]\n'
ASK = ("-p", "hello", "--max-tokens", 6, "--json")


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in Q4_0, with a vocabulary that torch's 4-bit kernel takes."""
    path = tmp_path_factory.mktemp("q4") / "q4.gguf"
    return write_tiny_llama(path, weight_type=GGMLQuantizationType.Q4_0, vocab=272)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A policy by which every pattern is fused."""
    path = tmp_path / "whole.toml"
    path.write_text(WHOLE)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The same, with nothing fused."""
    path = tmp_path / "plain.toml"
    path.write_text(f"fuse = false\n\n{WHOLE}")
    return path


def answer(*arguments: object) -> Any:
    result = call_command(*arguments)
    assert (result.code, result.err) == (0, ""), result
    return json.loads(result.out)


def lock(model: Path, path: Path, *options: object) -> Result:
    result = call_command("plan", model, "--lock", path, *options)
    assert result.code == 0, result
    return result


# Locks.


def test_lock_writes_a_file_and_says_its_fingerprint_beside_the_plan(q4: Path, small: Path, tmp_path: Path):
    result = lock(q4, tmp_path / "p.json", "--policy", small, "--json")
    document = json.loads(result.out)
    assert result.err == f"{tmp_path / 'p.json'}: locked {document['fingerprint']}\n"
    assert json.loads((tmp_path / "p.json").read_text())["fingerprint"] == document["fingerprint"]


@pytest.mark.parametrize("options", [(), ("--policy", "small"), ("--use", "*=reference:f32")], ids=repr)
def test_a_locked_plan_runs_as_the_plan_it_was(q4: Path, small: Path, tmp_path: Path, options: tuple[str, ...]):
    given = [small if option == "small" else option for option in options]
    lock(q4, tmp_path / "p.json", *given)
    free, locked = answer("run", q4, *given, *ASK), answer("run", q4, "--plan", tmp_path / "p.json", *ASK)
    for key in ("ids", "text", "fingerprint", "kernels"):
        assert locked[key] == free[key]


def test_run_refuses_a_lock_of_another_model(q4: Path, tiny: Path, tmp_path: Path):
    lock(tiny, tmp_path / "p.json")
    result = call_command("run", q4, "--plan", tmp_path / "p.json", *ASK)
    assert_one_line_error(result, "PlanError", "p.json", "the graph is", "lock it anew")


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ('"name": "torch:int4"', '"name": "torch:int5"', "torch:int5"),
        ('"device_class": "cpu', '"device_class": "cuda sm_90 H100', "device class"),
        ('"mul_mat torch:int4": "', '"mul_mat torch:int4": "0', "version of mul_mat torch:int4 is "),
        ('"fingerprint": "', '"fingerprint": "0', "fingerprint"),
        ('"lock": 2', '"lock": 99', "lock file of version 2"),
        ("{", "", "not a lock file"),
    ],
    ids=["kernel", "device class", "version", "fingerprint", "format", "damage"],
)
def test_run_refuses_a_lock_that_does_not_hold_any_more(
    q4: Path, small: Path, tmp_path: Path, old: str, new: str, hint: str
):
    lock(q4, tmp_path / "p.json", "--policy", small)
    text = (tmp_path / "p.json").read_text()
    assert old in text
    (tmp_path / "p.json").write_text(text.replace(old, new, 1))
    assert_one_line_error(call_command("run", q4, "--plan", tmp_path / "p.json", *ASK), "p.json", hint)


def test_run_refuses_a_lock_that_is_not_there(q4: Path, tmp_path: Path):
    assert_one_line_error(call_command("run", q4, "--plan", tmp_path / "none.json", *ASK), "none.json", "No such file")


@pytest.mark.parametrize(
    "options",
    [("--policy", "small"), ("--use", "add=torch"), ("--max-rows", "8")],
    ids=["--policy", "--use", "--max-rows"],
)
def test_a_locked_plan_takes_no_policy(q4: Path, small: Path, tmp_path: Path, options: tuple[str, ...]):
    """A lock says all; what a policy beside it should mean nobody could tell."""
    lock(q4, tmp_path / "p.json", "--policy", small)
    given = [small if option == "small" else option for option in options]
    result = call_command("run", q4, "--plan", tmp_path / "p.json", *given, *ASK)
    assert (result.code, result.out) == (2, "")
    assert "a locked plan takes no --policy, no --exact and no --use" in result.err


def test_a_lock_that_cannot_be_written_is_one_line(q4: Path, tmp_path: Path):
    result = call_command("plan", q4, "--lock", tmp_path / "no" / "p.json")
    assert_one_line_error(result, "there is no folder", "to write p.json to")


# --why.


def test_why_tells_of_one_node_in_every_bucket(q4: Path, small: Path):
    document = answer("plan", q4, "--policy", small, "--why", "blk.1.attn_output", "--json")
    assert document["node"] == "blk.1.attn_output"
    found = [(bucket["rows"], bucket["node"], bucket["kernel"], bucket["reason"]) for bucket in document["buckets"]]
    assert found == [
        (8, "blk.1.attn_output", "torch:int4", f"rule 1 ({small}:1)"),
        (512, "blk.1.attn_output", "torch:f32", found[1][3]),
    ]
    assert found[1][3].startswith(f"defaults ({small}")
    losers = {loser["kernel"]: loser for loser in document["buckets"][0]["rejected"]}
    assert losers["torch:int8"]["kind"] == "format"
    assert losers["reference:f32"]["kind"] == "outranked"
    assert all(loser["reason"] for loser in losers.values())


def test_why_is_readable_too(q4: Path, small: Path):
    result = call_command("plan", q4, "--policy", small, "--why", "blk.0.attn_norm")
    assert result.code == 0
    assert all(len(line) <= 100 for line in result.out.splitlines())
    first, *losers = result.out.replace("\n    ", " ").splitlines()
    assert first.startswith("rows 1..512: blk.0.attn_norm (rms_norm) runs torch:f32: defaults")
    (line,) = (line for line in losers if re.match(r"  not .*reference:f32\b", line))
    assert line.endswith("[outranked]")


def test_why_tells_of_fused_candidates_too(q4: Path, small: Path):
    options = ("plan", q4, "--policy", small, "--why", "blk.0.ffn_up")
    considered = answer(*options, "--json")["considered"]
    fused = {loser["kernel"]: loser for loser in considered if loser["kernel"].endswith(" of gate_up_swiglu")}
    assert fused["reference:f64 of gate_up_swiglu"]["kind"] == "outranked"
    _, _, said = call_command(*options).out.partition("fused candidates:\n")
    assert "reference:f64 of gate_up_swiglu" in " ".join(said.split())
    assert fused["reference:f64 of gate_up_swiglu"]["reason"] in " ".join(said.split())


def test_why_takes_the_name_of_a_row_of_the_table(q4: Path, small: Path, whole: Path):
    one, both = (
        call_command("plan", q4, "--policy", small, "--why", name).out
        for name in ("blk.1.attn_output", "blk.0..1.attn_output")
    )
    assert both == one.replace("blk.1.", "blk.0..1.")
    rows = read_table(call_command("plan", q4, "--policy", whole).out.split("\n\n")[1].splitlines())[1:]
    for name, *_ in rows:
        document = answer("plan", q4, "--policy", whole, "--why", name, "--json")
        nodes = {bucket["node"] for bucket in document["buckets"]}
        if "+..+" in name:
            before, _, after = (expanded(part) for part in name.partition("+..+"))
            assert len(nodes) == len(before)
            assert all(node.startswith(tuple(before)) and node.endswith(tuple(after)) for node in nodes)
        else:
            assert nodes == set(expanded(name))
    refused = call_command("plan", q4, "--policy", small, "--why", "blk.0..7.attn_output")
    assert_one_line_error(refused, "no node 'blk.0..7.attn_output'")


def test_why_tells_what_a_fused_node_takes_the_place_of(q4: Path, whole: Path):
    said = " ".join(call_command("plan", q4, "--policy", whole, "--why", "blk.0.ffn_up").out.split())
    assert "(gate_up_swiglu) runs reference:f32: in place of 4 nodes" in said
    assert "not reference:f32 of mul_mat, silu, mul: all 4 nodes run as one [outranked]" in said


@pytest.mark.parametrize("part", ["ffn_gate", "ffn_up", "ffn_silu", "ffn_mul"])
def test_why_of_a_part_tells_of_the_node_that_stands_for_it(q4: Path, whole: Path, part: str):
    document = answer("plan", q4, "--policy", whole, "--why", f"blk.0.{part}", "--json")
    fused = "blk.0.ffn_gate+ffn_up+ffn_silu+ffn_mul"
    assert {bucket["node"] for bucket in document["buckets"]} == {fused}
    assert answer("plan", q4, "--policy", whole, "--why", fused, "--json")["buckets"] == document["buckets"]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("blk.0.attn_nrm", "blk.0.attn_norm"),
        ("BLK.1.attention", "blk.1.attention"),
        ("blk.0.ffn_upp", "blk.0.ffn_up"),
    ],
    ids=["a node", "in capitals", "a part"],
)
def test_why_of_an_unknown_node_says_the_nearest(q4: Path, whole: Path, asked: str, meant: str):
    result = call_command("plan", q4, "--policy", whole, "--why", asked)
    assert_one_line_error(result, f"no node '{asked}'", f"did you mean '{meant}'?")


def test_why_of_nothing_like_a_node_names_the_way_to_find_one(q4: Path):
    assert_one_line_error(call_command("plan", q4, "--why", "???"), "no node '???'", "kernelmux plan lists them")


# --diff.


def moves(*arguments: object) -> list[dict[str, Any]]:
    return answer("plan", *arguments, "--json")["moves"]


def test_diff_says_which_nodes_move_where_and_why(q4: Path, small: Path, tmp_path: Path):
    other = tmp_path / "other.toml"
    other.write_text(f'[[rule]]\nnode = "blk.1.attn_output"\nuse = "reference:f64"\n\n{SMALL}')
    # What is converted around the node moves with it.
    found = [move for move in moves(q4, "--diff", small, other) if ".as_" not in move["node"]]
    assert [tuple(move.values()) for move in found] == [
        (rows, "blk.1.attn_output", before, "reference:f64", f"rule 1 ({other}:1)")
        for rows, before in ((8, "torch:int4"), (512, "torch:f32"))
    ]
    assert set(found[0]) == {"rows", "node", "before", "after", "reason"}


def test_a_policy_does_not_differ_from_itself(q4: Path, small: Path):
    assert moves(q4, "--diff", small, small) == []
    result = call_command("plan", q4, "--diff", small, small)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("0 nodes move; fingerprints ")


def test_diff_is_readable_too_and_tells_of_nodes_that_come_and_go(q4: Path, whole: Path, plain: Path):
    result = call_command("plan", q4, "--diff", whole, plain)
    assert result.code == 0
    lines, last = result.out.split("\n\n")
    heading, *rows = read_table(lines.splitlines())
    assert heading == ["node", "rows", "before", "after", "reason"]
    cells = {node: (rows, *kernels) for name, rows, *kernels, _ in rows for node in expanded(name)}
    assert cells["blk.0.ffn_gate"] == ("1..512", "-", "reference:f32")
    assert [row[1:4] for row in rows if row[0].startswith("blk.0..1.ffn_gate+")] == [["1..512", "reference:f32", "-"]]
    nodes = {move["node"] for move in moves(q4, "--diff", whole, plain)}
    assert len(rows) < len(nodes)
    assert last.startswith(f"{len(nodes)} nodes move; ")


def test_diff_has_alike_layers_and_row_counts_in_one_row(q4: Path, small: Path, tmp_path: Path):
    other = tmp_path / "other.toml"
    other.write_text(f'[[rule]]\nop = "silu"\nuse = "reference:f64"\n\n{SMALL}')
    lines, last = call_command("plan", q4, "--diff", small, other).out.split("\n\n")
    silu = [row for row in read_table(lines.splitlines()) if ".as_" not in row[0]][1:]
    assert silu == [["blk.0..1.ffn_silu", "1..512", "torch:f32", "reference:f64", "rule 1 (line 1)"]]
    assert " nodes move; " in last


def reasons(model: Path, policy: Path) -> set[str]:
    """Why each node of a plan has its kernel: a lock keeps that too."""
    nodes = (
        json.loads(call_command("plan", model, "--policy", policy, "--json", "--rows", n).out)["nodes"] for n in "18"
    )
    return {node["reason"] for each in nodes for node in each}


def test_diff_takes_locks(q4: Path, small: Path, whole: Path, tmp_path: Path):
    path = tmp_path / "p.json"
    lock(q4, path, "--policy", small)
    assert moves(q4, "--diff", path, small) == []
    forth, back = moves(q4, "--diff", path, whole), moves(q4, "--diff", whole, path)
    assert forth
    assert {(m["rows"], m["node"], m["before"], m["after"]) for m in forth} == {
        (m["rows"], m["node"], m["after"], m["before"]) for m in back
    }
    assert {move["reason"] for move in back} <= {*reasons(q4, small), "another node takes its place"}


def test_diff_takes_the_default_policy_by_name(q4: Path, small: Path):
    assert moves(q4, "--diff", "default", "default") == []
    assert moves(q4, "--diff", small, "default")


def test_a_lock_is_known_by_what_it_holds(q4: Path, small: Path, tmp_path: Path):
    lock(q4, tmp_path / "plan.lock", "--policy", small)
    assert moves(q4, "--diff", tmp_path / "plan.lock", small) == []


@pytest.mark.parametrize("name", ["plan.lock", "plan.json"])
def test_a_lock_that_is_empty_is_no_empty_policy(q4: Path, small: Path, tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_text("\n")
    for arguments in (("plan", q4, "--diff", path, small), ("run", q4, "--plan", path, *ASK)):
        assert_one_line_error(call_command(*arguments), f"{path}: the lock file is empty; write one with plan --lock")


def test_an_empty_policy_is_one(q4: Path, tmp_path: Path):
    path = tmp_path / "p.toml"
    path.touch()
    assert moves(q4, "--diff", path, path) == []


def test_diff_of_a_lock_and_a_policy_takes_options_for_the_policy(q4: Path, small: Path, tmp_path: Path):
    lock(q4, tmp_path / "plan.lock", "--policy", small)
    moved = moves(q4, "--diff", tmp_path / "plan.lock", small, "--use", "add=reference:f64")
    assert moved
    assert {move["reason"] for move in moved} <= {"--use add=reference:f64", "another node takes its place"}


def test_diff_names_the_file_that_is_wrong(q4: Path, small: Path, tmp_path: Path):
    broken = tmp_path / "broken.toml"
    broken.write_text("rules = 1\n")
    assert_one_line_error(call_command("plan", q4, "--diff", small, broken), f"{broken}:1", "unknown key 'rules'")
    assert_one_line_error(
        call_command("plan", q4, "--diff", tmp_path / "none.json", small), "none.json", "No such file"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--diff", "small", "whole", "--lock", "x.lock"), "--diff is without --lock"),
        (("--diff", "small", "whole", "--policy", "small", "--rows", 1), "--diff is without --policy and --rows"),
        (("--device", "cuda:1", "--device-as", "cuda sm_90 NVIDIA H200"), "in place of --device cuda:1"),
        (("--device", "cpu", "--device-as", "cuda sm_90 NVIDIA H200"), "in place of --device cpu"),
        (("--diff", "locked", "locked", "--use", "add=torch"), "--diff of two lock files is without --use"),
        (("--device", "cpu:5"), "there is no device cpu:5"),
    ],
)
def test_options_that_have_no_use_for_each_other_are_an_error(
    q4: Path, small: Path, whole: Path, tmp_path: Path, options: tuple[object, ...], said: str
):
    locked = tmp_path / "plan.lock"
    if "locked" in options:
        lock(q4, locked)
    filled = [{"small": small, "whole": whole, "locked": locked}.get(option, option) for option in options]
    result = call_command("plan", q4, *filled)
    assert result.code == 2
    assert said in result.err


@pytest.mark.parametrize("what", ["model", "policy"])
def test_a_lock_does_not_take_the_place_of_what_the_plan_is_made_from(tiny: Path, small: Path, tmp_path: Path, what):
    model = tmp_path / "tiny.gguf"
    model.write_bytes(tiny.read_bytes())
    written = {"model": model, "policy": small}[what]
    before = written.read_bytes()
    result = call_command("plan", model, "--policy", small, "--lock", written)
    assert (result.code, result.out) == (2, "")
    assert f"is the {what} asked for: name another file" in result.err
    assert written.read_bytes() == before
