"""`kernelmux plan`: which kernel each node gets and why; policies and `--use`, right and wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from command import assert_one_line_error, call_command, expanded, read_table, span
from kernelmux.contract.device import find_device
from tiny_model import write_tiny_llama

pytestmark = pytest.mark.usefixtures("without_numba")
AVX2 = ("--device-as", "cpu avx2")
"""Of which the choices are the same on every machine."""
REFERENCE_FIRST = '[[rule]]\nop = "mul_mat"\nuse = ["reference:f64"]\n\n[defaults]\nuse = ["torch"]\n'


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in Q4_0, with a vocabulary that torch's 4-bit kernel takes."""
    path = tmp_path_factory.mktemp("q4") / "q4.gguf"
    return write_tiny_llama(path, weight_type=GGMLQuantizationType.Q4_0, vocab=272)


def planned(*arguments: object) -> dict[str, Any]:
    result = call_command("plan", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def kernels(document: dict[str, Any], op: str = "mul_mat") -> set[str]:
    return {node["kernel"] for node in document["nodes"] if node["op"] == op}


def policy(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_json_gives_every_node_its_kernel_reason_and_refusals(q4: Path):
    document = planned(q4)
    assert document["fingerprint"]
    assert document["policy"] == "default.toml"
    assert document["device"] == find_device("cpu").device_class
    for node in document["nodes"]:
        assert set(node) == {"name", "op", "kernel", "reason", "rejected"}
        assert ":" in node["kernel"]
        assert node["reason"]
        assert node["kernel"] not in {loser["kernel"] for loser in node["rejected"]}
        assert all(loser["reason"] and loser["kind"] for loser in node["rejected"])
    query = next(node for node in document["nodes"] if node["name"] == "blk.0.attn_q")
    assert query["op"] == "mul_mat"
    assert query["kernel"] == "torch:int4"
    assert {"reference:f32", "torch:int8"} <= {loser["kernel"] for loser in query["rejected"]}


def test_the_fingerprint_is_that_of_the_choices(q4: Path):
    prints = [planned(q4)["fingerprint"], planned(q4)["fingerprint"], planned(q4, "--use", "add=reference:f32")]
    assert prints[0] == prints[1] != prints[2]["fingerprint"]


def table(*arguments: object) -> tuple[list[list[str]], str]:
    """The rows of the command's table, its heading first, and what stands around it, wrapped lines in one piece."""
    result = call_command("plan", *arguments)
    assert (result.code, result.err) == (0, "")
    assert all(len(line) <= 100 for line in result.out.splitlines())
    title, lines, rest = result.out.split("\n\n", 2)
    return read_table(lines.splitlines()), f"{title}\n{' '.join(rest.split())}"


def short(reason: str) -> str:
    """As a narrow column has it."""
    line = re.search(r"default\.toml:(\d+)", reason)
    assert line
    return "auto" if reason.startswith("least predicted time") else f"line {line[1]}"


def test_the_table_has_every_node_once_for_each_row_count_with_its_kernel_and_reason(q4: Path):
    (heading, *rows), around = table(q4)
    assert heading == ["node", "op", "rows", "kernel", "reason"]
    for count in (1, 8, 9, 512):
        document = planned(q4, "--rows", count)
        shown = {
            node: (op.split()[0], kernel, reason)
            for name, op, held, kernel, reason in rows
            for node in expanded(name)
            if count in span(held)
        }
        assert shown == {
            node["name"]: (node["op"], node["kernel"], short(node["reason"])) for node in document["nodes"]
        }
        assert document["fingerprint"] in around
        assert re.search(
            rf"\b{document['launches']} (launches )?\({document['conversions']}( conversions)?\) at ", around
        )
    assert "by default.toml" in around


def test_alike_layers_are_one_row_for_decoding_and_one_for_prompts(q4: Path):
    rows, _ = table(q4, *AVX2)
    assert [row[1:4] for row in rows if row[0] == "blk.0..1.attn_q"] == [
        ["mul_mat Q4_0", "1..8", "torch:int4"],
        ["mul_mat Q4_0", "9..512", "torch:f32"],
    ]
    assert not [row for row in rows if re.match(r"blk\.\d+\.[a-z]", row[0])]


def test_with_a_row_count_the_table_shows_its_bucket_alone(q4: Path):
    rows, around = table(q4, *AVX2, "--rows", 20)
    assert {row[2] for row in rows[1:]} == {"9..512"}
    assert around.count("launches (") == 1
    assert around.count(" at 9..512 rows") == 1


def test_the_summary_stands_under_the_table_and_in_json(q4: Path):
    document = planned(q4)["summary"]
    _, around = table(q4)
    for phase, rows in (("decoding", 1), ("prompts", 512)):
        speed = document[phase]
        assert speed["rows"] == rows
        rate = f"{speed['tokens_per_second']:,.0f}"
        (bound, share), *_ = speed["bounds"].items()
        assert re.search(rf"{phase} +{rate} tokens/s predicted at 512 \w+: {bound} {share:.0%}", around)
        # Of a prompt one row has logits: those are computed as in decoding.
        assert kernels(planned(q4, "--rows", rows)) <= set(speed["kernels"]["mul_mat"])
    assert document["weights"] > document["second_copies"]
    assert all(clause in around for clause in document["missed"])


@pytest.mark.parametrize(("card", "tuned"), [("sm_80 NVIDIA A100", False), ("sm_90 NVIDIA H200", True)])
def test_a_card_that_no_table_knows_is_told_what_tuning_may_gain(card: str, tuned: bool):
    missed = planned("--random", "llama-1b:Q4_K_M", "--device-as", f"cuda {card}")["summary"]["missed"]
    told = [clause for clause in missed if "`kernelmux tune MODEL`" in clause]
    assert len(told) == (0 if tuned else 1)
    assert tuned or re.search(r"no tuning for NVIDIA A100: .* may gain up to \d+\.\d times in decoding", told[0])


def test_refusals_stand_under_verbose_once_each(q4: Path):
    assert "torch:int8" not in call_command("plan", q4).out
    result = call_command("plan", q4, "--verbose")
    _, _, refusals, _ = result.out.split("\n\n")
    assert refusals.splitlines()[0].split("  ")[0] == "node"
    said = [line for line in refusals.splitlines() if "torch:int8" in line]
    assert len(said) == 1
    assert re.match(r"blk\.0\.\.1\.attn_q, attn_k,.*  torch:int8  +it takes weights in", said[0])
    assert all(len(line) <= 100 for line in result.out.splitlines())


def test_a_backend_that_is_not_here_is_told_of_in_one_line_at_the_end(q4: Path, tmp_path: Path):
    path = policy(tmp_path, RULE.replace('"torch"', '"numba", "torch:f32"'))
    result = call_command("plan", q4, "--policy", path)
    _, *said = " ".join(result.out.split()).split("not on this device: ")
    assert len(said) == 1
    assert "numba (not installed: pip install kernelmux-numba)" in said[0]
    assert "numba" not in result.out.split("\n\n")[1]


@pytest.mark.parametrize("device", [(), ("--device-as", "cuda sm_90 NVIDIA H200")], ids=["cpu", "cuda"])
@pytest.mark.parametrize("format", ["Q4_K_M", "bf16"])
def test_a_model_of_32_layers_fits_a_screen(format: str, device: tuple[str, ...]):
    result = call_command("plan", "--random", f"llama-8b:{format}", *device)
    lines = result.out.splitlines()
    assert result.code == 0
    assert 20 < len(lines) <= 50
    assert max(map(len, lines)) <= 100


def test_the_row_count_picks_the_choices_that_are_shown(q4: Path):
    few = {"torch:int4", "torch:f32"}
    assert kernels(planned(q4, *AVX2)) == kernels(planned(q4, *AVX2, "--rows", 8)) == few
    assert kernels(planned(q4, *AVX2, "--rows", 9)) == {"torch:f32"}


def test_the_most_rows_of_a_step_may_be_asked_for(q4: Path):
    result = call_command("plan", q4, "--max-rows", 16)
    assert result.code == 0
    assert "tokens/s predicted at 16 rows" in result.out
    assert "1..16" in result.out


def test_more_rows_than_the_plan_takes_are_refused_with_both_numbers(q4: Path):
    for options in ((), ("--json",)):
        result = call_command("plan", q4, "--rows", 513, *options)
        assert (result.code, result.out) == (2, "")
        assert "--rows: the plan takes up to 512 rows, not 513: longer prompts run in several steps" in result.err
        assert "max_rows" not in result.err


def test_a_policy_file_chooses_and_is_the_reason(q4: Path, tmp_path: Path):
    path = policy(tmp_path, REFERENCE_FIRST)
    document = planned(q4, "--policy", path)
    assert kernels(document) == {"reference:f64"}
    assert kernels(document, "rms_norm") == {"torch:f32"}
    reasons = {node["op"]: node["reason"] for node in document["nodes"]}
    assert reasons["mul_mat"] == f"rule 1 ({path}:1)"
    assert reasons["rms_norm"] == f"defaults ({path}:5)"


def test_use_outranks_the_policy_and_a_later_use_an_earlier_one(q4: Path, tmp_path: Path):
    base = (q4, "--policy", policy(tmp_path, REFERENCE_FIRST))
    once = planned(*base, "--use", "mul_mat=torch:int4")
    both = call_command("plan", *base, "--use", "mul_mat=torch:int4", "--use", "mul_mat=torch:f32", "--json")
    twice = json.loads(both.out)
    assert kernels(once) == {"torch:int4"}
    assert next(node["reason"] for node in once["nodes"] if node["op"] == "mul_mat") == "--use mul_mat=torch:int4"
    assert kernels(twice) == {"torch:f32"}
    assert both.err.splitlines()[0].startswith("kernelmux: --use mul_mat=torch:int4 is never reached: --use mul_mat=")
    assert kernels(planned(q4, "--use", "*=reference")) == {"reference:f32"}


@pytest.mark.parametrize(
    ("option", "hints"),
    [
        ("mul_mat", ["--use mul_mat", "OP=KERNEL", "mul_mat=torch:int4"]),
        ("mul_mat=", ["OP=KERNEL"]),
        ("=torch", ["OP=KERNEL"]),
        ("mulmat=torch", ["unknown op 'mulmat'", "did you mean 'mul_mat'?", "rms_norm"]),
        ("mul_mat=troch", ["unknown backend 'troch'", "did you mean 'torch'?", "reference"]),
        ("mul_mat=troch:f32", ["unknown backend 'troch'", "did you mean 'torch'?"]),
        ("mul_mat=torch:int44", ["unknown kernel 'torch:int44'", "did you mean 'torch:int4'?"]),
        ("gate_up_swiglu=torch:int4", ["unknown kernel 'torch:int4' of gate_up_swiglu; known: none"]),
        ("mul_mat=torch int4", ["'torch int4'", "backend:kernel"]),
        ("mul_mat=torch,", ["--use mul_mat=torch,"]),
    ],
)
def test_a_wrong_use_is_one_line_with_what_would_work(q4: Path, option: str, hints: list[str]):
    assert_one_line_error(call_command("plan", q4, "--use", option), *hints)


RULE = '[[rule]]\nop = "mul_mat"\nuse = ["torch"]\n'


# What a policy's text is, and what the one line must hold.
WRONG = {
    "a typo in a key": (RULE + "\nlayr = 3\n", ["policy.toml:5", "unknown key 'layr'", "did you mean 'layer'?"]),
    "a typo in a key that is needed": (
        '# why\n[[rule]]\nop = "mul_mat"\nusse = ["torch"]\n',
        ["policy.toml:4", "'usse'", "did you mean 'use'?"],
    ),
    "a typo in a table": (RULE + '\n[default]\nuse = ["torch"]\n', ["policy.toml:5", "did you mean 'defaults'?"]),
    "a typo in a list of tables": ("\n" + RULE.replace("rule", "rules"), ["policy.toml:2", "did you mean 'rule'?"]),
    "no use": ('[[rule]]\nop = "mul_mat"\n', ["policy.toml:1", "'use'"]),
    "an unknown op": (RULE + RULE.replace("mul_mat", "mul_matt"), ["policy.toml:5", "did you mean 'mul_mat'?"]),
    "an empty range": (RULE + 'm = "8..1"\n', ["policy.toml:4", "'8..1'"]),
    "an unknown format": (RULE + 'weight = "Q4_9"\n', ["policy.toml:4", "'Q4_9'", "did you mean 'Q4_"]),
    "an unknown backend in a rule": (
        "\n" + RULE.replace("torch", "troch"),
        ["policy.toml:4: unknown backend 'troch'", "did you mean 'torch'?"],
    ),
    "an unknown backend in the defaults": (
        '\n[defaults]\nuse = ["troch"]\n',
        ["policy.toml:3: unknown backend 'troch'", "did you mean 'torch'?"],
    ),
    "an unknown backend that is forbidden": (
        'forbid = ["troch"]\n',
        ["policy.toml:1", "unknown backend 'troch'", "did you mean 'torch'?"],
    ),
    "an unknown kernel": (RULE.replace("torch", "torch:int44"), ["policy.toml:3: ", "did you mean 'torch:int4'?"]),
    "an open string": ('[[rule]]\nop = "mul_mat\n', ["policy.toml:2", "not TOML"]),
    "prose": ("this is prose\n", ["policy.toml:1", "not TOML"]),
}


@pytest.mark.parametrize(("text", "hints"), WRONG.values(), ids=WRONG)
def test_a_wrong_policy_is_one_line_with_file_line_and_nearest_spelling(
    q4: Path, tmp_path: Path, text: str, hints: list[str]
):
    path = policy(tmp_path, text)
    assert_one_line_error(call_command("plan", q4, "--policy", path), str(tmp_path), *hints)


def test_a_policy_may_name_an_official_backend_that_is_not_installed_and_is_told_so(q4: Path, tmp_path: Path):
    path = policy(tmp_path, RULE.replace('"torch"', '"numba", "torch:f32"'))
    result = call_command("plan", q4, "--policy", path, "--json")
    said = f"rule 1 ({path}:1) asks for numba, which is not installed: pip install kernelmux-numba"
    assert (result.code, result.err) == (0, f"kernelmux: {said}\n")
    document = json.loads(result.out)
    assert kernels(document) == {"torch:f32"}
    query = next(node for node in document["nodes"] if node["op"] == "mul_mat")
    refusals = {loser["kernel"]: loser["reason"] for loser in query["rejected"]}
    assert refusals["numba"] == "not installed: pip install kernelmux-numba"


def test_a_kernel_that_declines_under_a_rule_that_says_error_is_one_line_with_its_reason(q4: Path, tmp_path: Path):
    path = policy(tmp_path, '[[rule]]\nop = "mul_mat"\nuse = ["torch:int8"]\non_unsupported = "error"\n')
    result = call_command("plan", q4, "--policy", path)
    assert_one_line_error(result, "blk.0.attn_q", "policy.toml:1", "torch:int8", "Q8_0")


def test_a_lock_that_is_given_as_a_policy_is_told_where_it_goes(q4: Path, tmp_path: Path):
    path = tmp_path / "x.lock"
    call_command("plan", q4, "--lock", path)
    result = call_command("run", q4, "-p", "x", "--policy", path)
    assert_one_line_error(result, f"{path}:1: JSON, as a plan's lock file is", "run it with --plan")


def test_a_policy_file_that_is_missing_or_no_file_is_named(q4: Path, tmp_path: Path):
    missing = call_command("plan", q4, "--policy", tmp_path / "none.toml")
    assert_one_line_error(missing, "none.toml", "No such file")
    assert_one_line_error(call_command("plan", q4, "--policy", tmp_path), "directory")


def test_a_policy_that_is_not_text_is_named(q4: Path, tmp_path: Path):
    path = tmp_path / "policy.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert_one_line_error(call_command("plan", q4, "--policy", path), "policy.toml", "UTF-8")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_an_unknown_device_is_answered_with_the_known_ones(q4: Path, device: str):
    assert_one_line_error(call_command("plan", q4, "--device", device), f"'{device}'", "cpu", "cuda")


def test_a_card_that_is_not_there_is_named_beside_what_works(q4: Path):
    assert_one_line_error(call_command("plan", q4, "--device", "cuda:77"), "'cuda:77'", "cpu works")


def test_a_plan_for_a_random_model_needs_no_file_and_draws_nothing():
    result = call_command("plan", "--random", "llama-8b:Q4_K_M", "--json")
    assert result.code == 0
    assert json.loads(result.out)["graph"] == "random llama-8b Q4_K_M"
