"""`kernelmux graph`: table, DOT and JSON; and every kind of bad model file, as one line that says what would work."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Result, assert_one_line_error, call_command, expanded, read_table
from kernelmux.graph.graph import Graph
from kernelmux.models import open_model
from tiny_model import write_tiny_llama

LAYER = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "rope", "copy", "attention", "attn_output", "attn_add"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_mul", "ffn_down", "ffn_add"),
)


@pytest.fixture(scope="module")
def dot(tiny: Path) -> str:
    return call_command("graph", tiny, "--dot").out


def test_the_table_has_every_node_in_one_row_in_the_order_of_a_layer(tiny: Path):
    result = call_command("graph", tiny)
    title, table = result.out.split("\n\n")
    heading, *rows = read_table(line for line in table.splitlines() if not line.startswith(" "))
    assert heading == ["node", "op", "inputs", "outputs", "weights"]
    graph = open_model(tiny).graph
    assert title.startswith(f"{graph.name}: {len(graph.ops)} nodes; ")
    shown = [(node, op) for name, op, *_ in rows for node in expanded(name)]
    assert sorted(shown) == sorted((node.name, node.op) for node in graph.ops)
    assert [name.removeprefix("blk.0.") for name, _ in shown if name.startswith("blk.0.")] == list(LAYER)
    (query,) = (row for row in rows if row[0] == "blk.0..1.attn_q")
    assert query[2:] == [".attn_norm", "f32[m,64]", "f32[64,64]"]
    (first,), (other,) = ([row[2] for row in rows if row[0] == f"blk.{layer}.attn_norm"] for layer in (0, 1))
    assert (first, other) == ("embed", "-1.ffn_add")
    assert len(rows) < len(graph.ops)
    assert all(len(line) <= 100 for line in result.out.splitlines())


def test_json_is_the_graph_and_comes_back_as_the_same(tiny: Path):
    result = call_command("graph", tiny, "--json")
    graph = Graph.from_json(result.out)
    assert graph == open_model(tiny).graph
    assert f"{graph.to_json()}\n" == result.out


def test_dot_is_one_digraph_with_balanced_braces_and_quotes(dot: str):
    assert dot.startswith("digraph ")
    assert dot.rstrip().endswith("}")
    assert dot.count("{") == dot.count("}") == 1
    assert all(line.count('"') % 2 == 0 for line in dot.splitlines())


def test_dot_has_every_node_once_and_an_edge_for_every_value_that_is_read(dot: str, tiny: Path):
    graph = open_model(tiny).graph
    lines = [line.strip() for line in dot.splitlines()]
    for node in graph.nodes:
        declared = sum(line.startswith(f'"{node.name}" [') for line in lines)
        assert declared == (0 if node.role == "weight" else 1), node.name
    assert sum(" -> " in line for line in lines) == sum(len(node.inputs) for node in graph.ops)
    assert any(line.startswith('"blk.0.ffn_gate" -> "blk.0.ffn_silu" ') for line in lines)


def damaged(tmp_path: Path, tiny: Path, change: Callable[[bytes], bytes]) -> Result:
    """What the command says of the tiny model's file with its bytes changed."""
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(tiny.read_bytes()))
    return call_command("graph", path)


def test_a_file_cut_in_its_tensors_names_the_first_tensor_that_is_cut(tmp_path: Path, tiny: Path):
    result = damaged(tmp_path, tiny, lambda data: data[:-1000])
    assert_one_line_error(result, "damaged.gguf", "'blk.1.ffn_down.weight'", "truncated")


def test_a_file_cut_in_its_header_is_called_truncated(tmp_path: Path, tiny: Path):
    assert_one_line_error(damaged(tmp_path, tiny, lambda data: data[:3000]), "damaged.gguf", "truncated")


def test_an_empty_file_is_called_empty(tmp_path: Path, tiny: Path):
    assert_one_line_error(damaged(tmp_path, tiny, lambda data: b""), "damaged.gguf", "empty")


def test_a_wrong_magic_is_shown_beside_the_right_one(tmp_path: Path, tiny: Path):
    assert_one_line_error(damaged(tmp_path, tiny, lambda data: b"PK\3\4" + data[4:]), "PK", "GGUF")


def test_absurd_counts_in_the_header_are_shown_and_cost_nothing(tmp_path: Path, tiny: Path):
    result = damaged(tmp_path, tiny, lambda data: data[:8] + struct.pack("<QQ", 2**60, 2**61) + data[24:])
    assert_one_line_error(result, "damaged.gguf", str(2**60), str(2**61))


def test_an_unknown_quant_type_names_its_number_its_tensor_and_the_known_types(tmp_path: Path, tiny: Path):
    name = b"token_embd.weight"

    def change(data: bytes) -> bytes:
        at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
        (dimensions,) = struct.unpack_from("<I", data, at)
        at += 4 + 8 * dimensions
        return data[:at] + struct.pack("<I", 77) + data[at + 4 :]

    assert_one_line_error(damaged(tmp_path, tiny, change), "'token_embd.weight'", "77", "2 Q4_0", "14 Q6_K")


def test_a_missing_tensor_is_named(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "model.gguf", omit=["blk.1.ffn_up.weight"])
    assert_one_line_error(call_command("graph", path), "model.gguf", "'blk.1.ffn_up.weight' is missing")


def test_a_wrong_shape_is_shown_beside_the_right_one(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "model.gguf", reshape={"blk.0.attn_k.weight": (48, 64)})
    assert_one_line_error(call_command("graph", path), "'blk.0.attn_k.weight'", "(48, 64)", "(32, 64)")


def test_an_unknown_architecture_is_answered_with_the_known_ones(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "model.gguf", architecture="lama")
    assert_one_line_error(call_command("graph", path), "'lama'", "did you mean 'llama'?", "known: gemma")


def test_a_missing_key_of_the_metadata_is_named(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "model.gguf", extra={"llama.block_count": None})
    assert_one_line_error(call_command("graph", path), "model.gguf", "llama.block_count")


def test_a_file_that_does_not_exist_is_named(tmp_path: Path):
    assert_one_line_error(call_command("graph", tmp_path / "none.gguf"), "none.gguf", "no such file")


def test_a_directory_that_is_no_model_is_told(tmp_path: Path):
    assert_one_line_error(call_command("graph", tmp_path), "without config.json", ".gguf")
