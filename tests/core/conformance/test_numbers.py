"""Numbers beside a file of cases: they come back to the bit, and what is wrong with such a file is one line."""

import json

import pytest
import torch

from command import assert_one_line_error, call_command
from kernelmux.conformance.case_file import read_cases, write_kept
from kernelmux.conformance.draw import draw_case
from kernelmux.conformance.testing import one_node
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value, empty_planes
from kernelmux.models.safetensors import write_safetensors

FORMATS = ["f32", "bf16", "fp8_row", "fp8_block", "q8_32"]


def kept(tmp_path, node):
    """A case of a node with bytes at random, its file, and those planes."""
    generator = torch.Generator().manual_seed(0)
    tensors = [empty_planes(value) for value in (*node.inputs, *node.weights)]
    for part in (part for planes in tensors for part in planes):
        part.view(torch.uint8).random_(0, 64, generator=generator)
    path = tmp_path / "case.json"
    assert write_kept(node, tensors, path) == json.loads(path.read_text())["cases"][0]["graph"]
    return path, tensors


def product(format="f32", weight="Q4_0"):
    return one_node("mul_mat", Value("any", (2, 128), format), weight=(Value("blk.0.w", (3, 128), weight),))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("weight", ["f32", "Q4_0", "fp8_row"])
def test_all_planes_come_back_to_the_bit(tmp_path, format, weight):
    path, (x, w) = kept(tmp_path, product(format, weight))
    (case,) = read_cases(path).cases
    drawn = draw_case(case)
    for found, stored in ((drawn.inputs["x"], x), (drawn.weights["weight"].planes, w)):
        assert all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(found, stored, strict=True))


def test_an_id_beyond_its_table_is_refused(tmp_path):
    node = one_node("embed", Value("ids", (2,), "i32"), Value("table", (3, 8)))
    path = tmp_path / "case.json"
    write_kept(node, [(torch.tensor([0, 3], dtype=torch.int32),), empty_planes(node.inputs[1])], path)
    with pytest.raises(GraphError, match="ids must be from 0 to 2"):
        read_cases(path)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("../case.safetensors", "names a file beside this one"),
        ("/case.safetensors", "names a file beside this one"),
        (3, "names a file beside this one"),
        ("case.json", "names a file beside this one"),
        ("gone.safetensors", "no such file"),
        ("other.safetensors", "must hold 'x' as float32 [2, 128], it has float32 [2, 64]"),
        ("less.safetensors", "must hold 'weight' as uint8 [3, 72], it has nothing"),
    ],
)
def test_what_is_wrong_with_the_numbers_is_one_line(tmp_path, stated, said):
    path, _ = kept(tmp_path, product())
    for name, width in (("other", 64), ("less", 128)):
        with open(tmp_path / f"{name}.safetensors", "wb") as file:
            write_safetensors({"x": torch.zeros(2, width)}, file)
    document = json.loads(path.read_text())
    document["cases"][0]["numbers"] = stated
    path.write_text(json.dumps(document))
    assert_one_line_error(call_command("check", "--cases", path), "case 1 of 1", said)
