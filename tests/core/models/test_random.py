"""Random models: known shapes, the same numbers each time, drawn only when asked, and activations that stay finite."""

from __future__ import annotations

import pytest
import torch

from kernelmux.contract.device import described_device
from kernelmux.errors import ModelError
from kernelmux.graph.formats import FORMATS, Format, Plane, Weight
from kernelmux.graph.ops.cases import FP8_WEIGHTS
from kernelmux.models import open_random
from kernelmux.models.random import SHAPES, STORED, RandomWeights, random_file
from kernelmux.run.model import load_random


def drawn(stored: str, shape: tuple[int, ...] = (64, 512), name: str = "w") -> Weight:
    return RandomWeights({name: Weight(name, shape, stored, ())}, "cpu")[name]


@pytest.mark.parametrize("stored", STORED)
def test_a_model_of_any_format_gives_finite_logits(stored: str):
    model = load_random(f"tiny:{stored}")
    logits = model.forward([1, 2, 3, 4], model.plan(use=["*=reference"]))
    assert logits.isfinite().all()
    assert 0.2 < float(logits.std()) < 5


@pytest.mark.parametrize(
    "stored", ["f32", "bf16", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q6_K", "fp8_row", "int4_64"]
)
def test_weights_have_the_spread_that_keeps_a_variance(stored: str):
    dense = drawn(stored).dequantize()
    assert dense.std().item() == pytest.approx(512**-0.5, rel=0.1)
    assert abs(dense.mean().item()) < 0.1 * 512**-0.5


def test_a_weight_is_drawn_anew_yet_the_same_and_differs_from_others():
    first, again = drawn("Q4_K").planes[0], drawn("Q4_K").planes[0]
    assert first.equal(again)
    assert first.data_ptr() != again.data_ptr()
    assert not first.equal(drawn("Q4_K", name="v").planes[0])


def test_looking_a_name_up_draws_nothing():
    weights = RandomWeights({"w": Weight("w", (8, 8), "no such format", ())}, "cpu")
    assert "w" in weights
    assert "v" not in weights
    assert (list(weights), len(weights)) == (["w"], 1)


def test_building_the_graph_of_a_large_model_draws_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "randn", None)
    monkeypatch.setattr(torch, "randint", None)
    source = open_random("llama-70b:Q4_K_M")
    assert source.shape.layers == 80
    assert sum(node.op == "mul_mat" for node in source.graph.ops) == 80 * 7 + 1


@pytest.mark.parametrize(("asked", "parameters"), [("llama-8b", 8.03e9), ("llama-1b", 1.236e9), ("llama-70b", 70.55e9)])
def test_shapes_have_the_parameters_that_their_names_promise(asked: str, parameters: float):
    weights = random_file(f"{asked}:bf16").weights.values()
    assert sum(torch.Size(weight.shape).numel() for weight in weights) == pytest.approx(parameters, rel=0.002)


def test_q4_k_m_keeps_delicate_tensors_in_q6_k_as_llama_cpp_does():
    weights = random_file("llama-8b:q4_k_m").weights
    wide = [weights[f"blk.{layer}.ffn_down.weight"].format for layer in range(32)]
    assert wide.count("Q6_K") == 16
    assert (wide[0], wide[4], wide[6], wide[31]) == ("Q6_K", "Q4_K", "Q6_K", "Q6_K")
    assert weights["output.weight"].format == "Q6_K"
    assert weights["token_embd.weight"].format == "Q4_K"
    assert weights["blk.0.attn_q.weight"].format == "Q4_K"
    assert weights["blk.0.attn_norm.weight"].format == "f32"


def test_every_weight_format_is_one_of_every_shape_that_its_blocks_divide():
    for shape in SHAPES:
        for stored in STORED:
            # 576 columns are no blocks of 128.
            if shape != "smollm2-135m" or stored not in ("fp8_128x128", "int4_128", "int4_128_bf16"):
                weights = random_file(f"{shape}:{stored}").weights.values()
                assert all(FORMATS[weight.format].check(weight.shape) is None for weight in weights)


def test_q4_k_m_of_narrow_rows_uses_blocks_of_32():
    weights = random_file("smollm2-135m:Q4_K_M").weights
    assert weights["blk.4.attn_q.weight"].format == "Q5_0"
    assert weights["blk.0.attn_v.weight"].format == "Q8_0"
    assert weights["blk.4.ffn_down.weight"].format == "Q4_K"


@pytest.mark.parametrize("stored", [*FP8_WEIGHTS, "int4_128_bf16"])
def test_files_of_such_weights_keep_embeddings_and_logits_in_bf16(stored: str):
    weights = random_file(f"llama-8b:{stored}").weights
    assert {weights[name].format for name in ("token_embd.weight", "output.weight")} == {"bf16"}
    assert weights["output_norm.weight"].format == weights["blk.0.attn_norm.weight"].format == "f32"
    assert {w.format for name, w in weights.items() if "blk." in name and "norm" not in name} == {stored}


@pytest.mark.slow
@pytest.mark.parametrize("stored", FP8_WEIGHTS)
def test_a_model_of_fp8_weights_is_planned_for_a_card_that_is_not_there(stored: str):
    plan = load_random(f"tiny:{stored}").plan(device=described_device("cuda sm_90 NVIDIA H200"))
    weights = [value for step in plan.schedule(1, 1).steps for value in step.node.weight]
    assert {value.format for value in weights if len(value.shape) == 2} == {stored, "bf16"}


def test_a_format_whose_blocks_do_not_divide_the_rows_of_a_shape_is_refused():
    with pytest.raises(ModelError, match=r"--random smollm2-135m:fp8_128x128: .*blocks of 128, 576 columns do not"):
        random_file("smollm2-135m:fp8_128x128")


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("lama-8b:bf16", "did you mean 'llama-8b'"), ("llama-8b:Q4_K_N", "did you mean 'Q4_K_M'"), ("llama-8b", "known")],
)
def test_an_unknown_name_is_told_the_nearest(asked: str, hint: str):
    with pytest.raises(ModelError, match=hint):
        random_file(asked)


def test_a_format_that_a_backend_brings_is_one_of_a_random_model_too(monkeypatch: pytest.MonkeyPatch):
    def draw(shape, generator):
        return (torch.randint(-3, 4, shape, generator=generator, device=generator.device).to(torch.int8),)

    steps = Format("steps", (Plane("steps", "int8"),), dequantize=lambda planes: planes[0].float() / 64, draw=draw)
    monkeypatch.setitem(FORMATS, "steps", steps)
    model = load_random("tiny:STEPS")
    assert model.graph.values["blk.0.attn_q.weight"].format == "steps"
    assert model.forward([1, 2], model.plan(use=["*=reference"])).isfinite().all()
    with pytest.raises(ModelError, match=r"did you mean 'steps'\?\); known: .*, steps"):
        random_file("tiny:step")


def test_text_is_read_byte_by_byte():
    tokenizer = open_random("tiny:f32").tokenizer
    assert len(tokenizer.encode("hello")) == 5
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.decode([300]) == "<300>"


def test_sizes_divide_into_heads():
    assert all(sizes.hidden % sizes.heads == sizes.heads % sizes.kv_heads == 0 for sizes in SHAPES.values())
