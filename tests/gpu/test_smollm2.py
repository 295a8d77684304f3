"""SmolLM2 on CUDA: the recorded answers in float32, and bfloat16's distance from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kernelmux
from kernelmux.conformance.measure import compare

pytestmark = pytest.mark.model

GOLDENS = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text("utf-8"))["cases"]
F32 = "*=triton:f32,torch:f32,triton,torch"
MOST_ERROR = {"bf16": 2e-3, "fp8_row": 5e-2}
"""NMSE of the logits against float32's: 30 layers of 8 or 4 significant bits."""


@pytest.fixture(scope="module")
def model(smollm2: Path):
    return kernelmux.load(smollm2)


@pytest.mark.parametrize("golden", GOLDENS, ids=["france", "village", "unicode", "chat"])
def test_the_greedy_answer_is_the_recorded_one_token_for_token(model, golden):
    answer = model.generate(golden["prompt"], model.plan(use=[F32], device="cuda"), max_tokens=48)
    "".join(answer)
    assert answer.ids == golden["greedy"][:48]


@pytest.mark.parametrize("kernel", MOST_ERROR)
@pytest.mark.parametrize("golden", GOLDENS, ids=["france", "village", "unicode", "chat"])
def test_smaller_types_keep_the_first_token(model, golden, kernel):
    plan = model.plan(use=[f"mul_mat=torch:{kernel},torch:bf16"], device="cuda")
    found = model.forward(golden["ids"], plan)[-1].cpu()
    wanted = model.forward(golden["ids"], model.plan(use=[F32], device="cuda"))[-1].cpu()
    assert int(found.argmax()) == golden["greedy"][0]
    assert compare(found, wanted.double(), MOST_ERROR[kernel]).failures == ()


def test_few_rows_by_one_kernel_and_many_by_another_in_one_process(model, tmp_path):
    policy = tmp_path / "mixed.toml"
    policy.write_text(
        '[[rule]]\nop = "mul_mat"\nm = "1..16"\nuse = ["torch:bf16"]\n\n'
        '[[rule]]\nop = "mul_mat"\nuse = ["torch:fp8_row", "torch:bf16"]\n\n[defaults]\nuse = ["triton", "torch"]\n'
    )
    plan = model.plan(policy, device="cuda")
    kernels = {step.choice.name for s in plan.schedules.values() for step in s.steps if step.node.op == "mul_mat"}
    assert {"torch:bf16", "torch:fp8_row"} <= kernels
    assert plan.extra_copy_bytes > 0
    ids = (GOLDENS[1]["ids"] * 8)[:100]
    answer = model.generate(ids, plan, max_tokens=16)
    assert len("".join(answer)) > 0
    torch.cuda.synchronize()


@pytest.mark.parametrize("backend", ["triton", "cupy"])
@pytest.mark.parametrize("golden", GOLDENS, ids=["france", "village", "unicode", "chat"])
def test_one_backend_alone_keeps_the_first_token(model, golden, backend):
    """At row counts that all kernels take; weights in 4 bits as the file has them."""
    pytest.importorskip(f"kernelmux_{backend}", reason=f"kernelmux-{backend} is not installed")
    plan = model.plan(use=[f"*={backend}"], device="cuda", max_rows=16)
    assert {step.choice.name.partition(":")[0] for s in plan.schedules.values() for step in s.steps} == {backend}
    found = model.forward(golden["ids"], plan)[-1].cpu()
    wanted = model.forward(golden["ids"], model.plan(use=[F32], device="cuda"))[-1].cpu()
    assert int(found.argmax()) == golden["greedy"][0]
    assert compare(found, wanted.double(), 1e-2).failures == ()


def test_every_backend_has_a_part_of_each_layer(model, tmp_path):
    for backend in ("triton", "cupy"):
        pytest.importorskip(f"kernelmux_{backend}", reason=f"kernelmux-{backend} is not installed")
    policy = tmp_path / "every.toml"
    policy.write_text(
        'fuse = false\n\n[[rule]]\nop = "mul_mat"\nnode = "*attn_*"\nuse = ["cupy:dp4a"]\n\n'
        '[[rule]]\nop = "mul_mat"\nnode = "*ffn_gate"\nuse = ["triton:dequant"]\n\n'
        '[[rule]]\nop = "mul_mat"\nuse = ["torch:bf16"]\n\n[defaults]\nuse = ["triton", "cupy", "torch"]\n'
    )
    plan = model.plan(policy, device="cuda", max_rows=16)
    layer = [step.choice.name for step in plan.schedule(1, 1).steps if step.node.layer == 3]
    assert {"cupy:dp4a", "triton:dequant", "torch:bf16"} <= set(layer)
    golden = GOLDENS[0]
    found = model.forward(golden["ids"], plan)[-1].cpu()
    wanted = model.forward(golden["ids"], model.plan(use=[F32], device="cuda"))[-1].cpu()
    assert int(found.argmax()) == golden["greedy"][0]
    assert compare(found, wanted.double(), 1e-2).failures == ()
