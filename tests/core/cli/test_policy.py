"""`kernelmux policy`: a check for a CI job, with lines and exit codes, and the schema for an editor."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from command import assert_one_line_error, call_command, read_table
from kernelmux.cli.common import say
from kernelmux.contract import registry
from kernelmux.contract.device import find_device
from kernelmux.policy.grammar import TABLES, Document
from kernelmux.policy.policy import parse_policy

GOOD = '[[rule]]\nop = "mul_mat"\nuse = ["torch:f32"]\n\n[defaults]\nuse = ["torch", "reference"]\n'
EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "policies").glob("*.toml"))


@pytest.fixture
def written(tmp_path: Path):
    """Writes a policy: `written(text)` is its path."""

    def write(text: str) -> Path:
        path = tmp_path / "p.toml"
        path.write_text(text)
        return path

    return write


def findings(path: Path, *options: object) -> list[tuple[int, str]]:
    """What `check --json` says, and that the exit code agrees."""
    result = call_command("policy", "check", path, *options, "--json")
    document = json.loads(result.out)
    assert document["file"] == str(path)
    assert (result.code, result.err) == (1 if document["findings"] else 0, "")
    assert all(set(finding) == {"line", "message"} for finding in document["findings"])
    return [(finding["line"], finding["message"]) for finding in document["findings"]]


def test_a_good_policy_has_no_findings_and_exit_code_0(written, tiny: Path):
    path = written(GOOD)
    result = call_command("policy", "check", path, "--model", tiny)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{path}: no findings\n"
    assert findings(path) == findings(path, "--model", tiny) == []


def test_findings_are_lines_that_an_editor_can_jump_to_and_exit_code_1(written):
    path = written(GOOD.replace("torch:f32", "torch:f23") + '\n[[rule]]\nop = "mul_mat"\nuse = "troch"\n')
    result = call_command("policy", "check", path)
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    assert lines == [
        f"{path}:3: unknown kernel 'torch:f23' (did you mean 'torch:f32'?); known: {lines[0].partition('known: ')[2]}",
        f"{path}:8: rule 2 is never reached: rule 1 ({path}:1) matches all that it does",
        f"{path}:10: unknown backend 'troch' (did you mean 'torch'?); known: {', '.join(registry.current().backends)}",
    ]
    assert findings(path) == [
        (int(line.split(":")[1]), line.removeprefix(f"{path}:").partition(": ")[2]) for line in lines
    ]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("use = ", 1, "not TOML"),
        ("\n\nrules = 1\n", 3, "unknown key 'rules' (did you mean 'rule'?)"),
        (GOOD + '\n[[rule]]\nop = "mulmat"\nuse = "torch"\n', 9, "op: unknown op 'mulmat' (did you mean 'mul_mat'?)"),
        (GOOD + "\n[kv]\nformat = 8\n", 9, "format: unknown cache format 8"),
        ('[[rule]]\nop = "add"\n', 1, "rule lacks the key 'use'"),
    ],
    ids=["syntax", "key", "op", "value", "missing key"],
)
def test_a_file_that_is_no_policy_is_a_finding_with_its_line(written, text: str, line: int, message: str):
    ((found_line, found),) = findings(written(text))
    assert found_line == line
    assert found.startswith(message)


def test_all_mistakes_of_a_file_are_told_and_a_plan_counts_them(written, tiny: Path):
    path = written('[[rule]]\nop = "matmul"\nusse = "torch"\n\n[kv]\nformat = 8\n\n[[rule]]\nwhere = { n = -5 }\n')
    found = findings(path)
    assert [line for line, _ in found] == [2, 3, 6, 8, 9]
    starts = ["op: unknown op", "unknown key 'usse'", "format: ", "rule lacks the key 'use'", "where: n is never -5"]
    assert all(message.startswith(start) for (_, message), start in zip(found, starts, strict=True))
    result = call_command("plan", tiny, "--policy", path)
    assert_one_line_error(result, f"{path}:2: op: unknown op", f"; and 4 more: kernelmux policy check {path}")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_on_a_terminal_long_lines_are_broken_between_words(monkeypatch: pytest.MonkeyPatch, stream: str):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((140, 24)))
    monkeypatch.setattr(sys, stream, Terminal())
    message = " ".join(["kernelmux: PolicyError:", *["word"] * 50])
    say(message, err=stream == "stderr")
    first, *rest = re.sub(r"\x1b\[[\d;]*m", "", getattr(sys, stream).getvalue()).splitlines()
    assert rest
    assert all(len(line) <= 100 for line in (first, *rest))
    assert "".join([first, *(line.replace("  ", " ", 1) for line in rest)]) == message


def test_the_default_policy_goes_by_its_name():
    assert call_command("policy", "check", "default").out == "default: no findings\n"


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path):
    (tmp_path / "p.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert findings(tmp_path / "p.toml") == []


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path):
    assert_one_line_error(call_command("policy", "check", tmp_path / "none.toml"), "none.toml", "No such file")
    assert_one_line_error(call_command("policy", "check", tmp_path), str(tmp_path), "directory")


def test_a_file_that_is_not_text_is_a_finding(tmp_path: Path):
    (tmp_path / "p.toml").write_bytes(GOOD.encode() + b"# \xff\xfe\x00")
    ((line, message),) = findings(tmp_path / "p.toml")
    assert line == GOOD.count("\n") + 1
    assert message == "not UTF-8 text (byte 0xff): save it as UTF-8"


def test_a_model_shows_rules_that_match_none_of_its_nodes(written, tiny: Path):
    text = f'[[rule]]\nlayer = "5.."\nuse = "torch"\n\n[[require]]\nop = "qkv"\nkernel = "torch"\n\n{GOOD}'
    path = written(text)
    assert findings(path) == []
    assert findings(path, "--model", tiny) == [
        (1, f"rule 1 matches no node of tiny on {find_device('cpu').device_class}"),
        (5, f"requirement 1 matches no node of tiny on {find_device('cpu').device_class}"),
    ]


def test_a_model_shows_requirements_that_fail(written, tiny: Path):
    path = written(f'{GOOD}\n[[require]]\nop = "mul_mat"\nkernel = ["torch:bf16", "reference"]\n')
    ((line, message),) = findings(path, "--model", tiny)
    assert line == 8
    assert "torch:bf16 or reference" in message
    assert "blk.0.attn_q has torch:f32" in message
    # The line is said once.
    assert f"{path}:8" not in message


def test_a_model_that_cannot_be_read_is_an_error(written, tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for model in (tmp_path / "none.gguf", tmp_path / "broken.gguf"):
        assert_one_line_error(call_command("policy", "check", written(GOOD), "--model", model), model.name)


def test_an_unknown_device_is_an_error(written):
    assert_one_line_error(call_command("policy", "check", written(GOOD), "--device", "gpu"), "'gpu'", "cpu")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_policies_pass(path: Path):
    assert findings(path) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_policies_run_a_model(path: Path, tiny: Path):
    result = call_command("run", tiny, "-p", "hello", "--max-tokens", 3, "--policy", path, "--json")
    assert result.code == 0
    assert len(json.loads(result.out)["ids"]) == 3
    # They are for many models and devices: what this one has nothing of is told.
    unused = rf"kernelmux: [^\n]*{re.escape(str(path))}:\d+\)(:| match(es)?) no node of tiny on cpu[^\n]*\n"
    assert re.fullmatch(f"({unused})?", result.err)


@pytest.mark.model
def test_the_whole_example_of_the_page_plans_a_model_as_it_says(written, smollm2: Path):
    page = Path(__file__).parents[3] / "docs" / "policy.md"
    path = written(page.read_text("utf-8").partition("```toml\n")[2].partition("```")[0])
    assert findings(path, "--model", smollm2) == []
    result = call_command("plan", smollm2, "--policy", path)
    assert (result.code, result.err) == (0, "")
    table = read_table(result.out.split("\n\n")[1].splitlines())
    rows = {(name, *rest) for name, _, *rest in table}
    assert ("blk.0..1.attn_q", "1..8", "torch:int4", "line 1") in rows
    assert ("blk.0..1.attn_q", "9..512", "torch:f32", "line 7") in rows


def test_the_default_policy_passes(written):
    text = resources.files("kernelmux.policy").joinpath("default.toml").read_text("utf-8")
    assert findings(written(text)) == []


# The schema.


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    result = call_command("policy", "schema")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def _tables(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schema's object of each table, by the table's key; "" is the document's."""
    found = {"": schema}
    for key, entry in schema["properties"].items():
        place = entry.get("items", entry)
        reference = place.get("$ref") or next((part["$ref"] for part in place.get("allOf", ())), None)
        if reference is not None:
            found[key] = schema["$defs"][reference.removeprefix("#/$defs/")]
    return found


def test_the_schema_has_every_key_of_every_table_described_and_no_other(schema: dict[str, Any]):
    tables = _tables(schema)
    assert set(tables) == {"", *TABLES}
    for name, table in tables.items():
        model = TABLES.get(name, Document)
        assert table["type"] == "object"
        assert table["additionalProperties"] is False
        assert set(table["properties"]) == set(model.model_fields)
        assert all(entry.get("description") for entry in table["properties"].values())
        needed = {key for key, field in model.model_fields.items() if field.is_required()}
        assert set(table.get("required", ())) == needed


def test_the_schema_refers_to_nothing_that_it_lacks(schema: dict[str, Any]):
    references = [part.split('"')[0] for part in json.dumps(schema).split('"$ref": "')[1:]]
    assert references
    for reference in references:
        assert reference.startswith("#/$defs/")
        assert reference.removeprefix("#/$defs/") in schema["$defs"]


def test_what_the_schema_lists_as_values_is_what_a_policy_may_say(schema: dict[str, Any]):
    rule = _tables(schema)["rule"]["properties"]
    for key in ("device", "on_unsupported", "on_error"):
        (values,) = (part["enum"] for part in rule[key]["anyOf"] if "enum" in part)
        for value in values:
            parse_policy(f'[[rule]]\nuse = "a"\n{key} = "{value}"\n', "p.toml")
