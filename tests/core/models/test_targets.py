"""What tensors are to be stored as: rules in order, and what cannot be stored so."""

from __future__ import annotations

import gguf
import pytest

from kernelmux.errors import ModelError
from kernelmux.graph.formats import Weight
from kernelmux.models.targets import FILE_TYPES, FORMATS_WRITTEN, parse_rule, targets, written_format

WEIGHTS = [
    Weight("token_embd.weight", (512, 256), "f16", ()),
    Weight("blk.0.attn_norm.weight", (256,), "f16", ()),
    Weight("blk.0.attn_q.weight", (256, 256), "Q8_0", ()),
    Weight("blk.0.ffn_gate_inp.weight", (8, 256), "f32", ()),
    Weight("blk.1.ffn_down.weight", (256, 96), "Q8_0", ()),
    Weight("blk.1.ffn_odd.weight", (256, 40), "f32", ()),
    Weight("ids", (2, 256), "i32", ()),
]


def stored(format, *rules):
    return {target.weight.name: target.format for target in targets(WEIGHTS, format, [*map(parse_rule, rules)])}


def test_the_first_rule_that_matches_wins():
    found = stored("Q4_K", "blk.0.attn_q.*=q6_k", "blk.0.*=Q8_0", "token_embd.weight=bf16")
    assert (found["blk.0.attn_q.weight"], found["token_embd.weight"]) == ("Q6_K", "bf16")
    assert found["blk.0.ffn_gate_inp.weight"] == "Q8_0", "a rule may name a router, which the default leaves"


def test_what_is_not_stored_as_asked_says_why():
    found = {target.weight.name: (target.format, target.reason) for target in targets(WEIGHTS, "Q4_K", [])}
    assert found == {
        "token_embd.weight": ("Q4_K", ""),
        "blk.0.attn_norm.weight": ("f32", "vectors are f32"),
        "blk.0.attn_q.weight": ("Q4_K", ""),
        "blk.0.ffn_gate_inp.weight": ("f32", "routers stay what they are"),
        "blk.1.ffn_down.weight": ("Q5_0", "Q5_0: rows of 96 do not divide into Q4_K's blocks"),
        "blk.1.ffn_odd.weight": ("f16", "f16: rows of 40 do not divide into Q4_K's blocks"),
        "ids": ("i32", "integers stay what they are"),
    }


def test_mistakes_are_told():
    for format, message in {
        "Q4_L": "--to: unknown format 'Q4_L' (did you mean 'Q4_K'?)",
        "fp8": "--to: unknown format 'fp8' (did you mean 'fp8_row'?)",
        "IQ4_XS": "--to: IQ4_XS is read, and not written in such a file; known: f32",
    }.items():
        with pytest.raises(ModelError) as caught:
            written_format(format, "--to")
        assert str(caught.value).startswith(message)
    for rule in ("blk", "=Q4_K", "blk="):
        with pytest.raises(ModelError, match="a rule is PATTERN=FORMAT"):
            parse_rule(rule)
    with pytest.raises(ModelError, match=r"--rule blk\.9\.\*=Q8_0: no tensor matches that no earlier rule has"):
        stored("Q4_K", "blk.9.*=Q8_0")
    with pytest.raises(ModelError, match=r"--rule \*norm\.weight=Q8_0: of all that it matches vectors are f32"):
        stored("Q4_K", "*norm.weight=Q8_0")
    assert stored("Q4_K", "*norm.weight=f32")["blk.0.attn_norm.weight"] == "f32"


def test_every_format_has_its_file_type():
    assert FILE_TYPES.keys() == {*FORMATS_WRITTEN}
    names = {"f32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S", "MXFP4": "MOSTLY_MXFP4_MOE"}
    for format, number in FILE_TYPES.items():
        assert gguf.LlamaFileType[names.get(format, f"MOSTLY_{format.upper()}")] == number
