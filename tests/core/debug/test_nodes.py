"""Two plans by node: who makes an error has it as its own, and those after it have only gathered it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernelmux
from fake_backend import FakeKernel, compute, whole_backend
from kernelmux.contract import registry
from kernelmux.debug.nodes import NodeError, node_errors
from kernelmux.errors import ModelError
from kernelmux.graph.ops import OPS
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import Model

IDS = list(range(40, 70))
EXACT = "*=torch:f32,torch:sdpa,torch:rows"


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


def errors_of(model: Model, work, rows: int = 64, policy: str = "fuse = false\n") -> dict[str, NodeError]:
    faulty = whole_backend(**{op: FakeKernel(work=work) for op in OPS})
    with registry.isolated(faulty=faulty, right=whole_backend()):
        first, second = (
            model.plan(parse_policy(f'{policy}[defaults]\nuse = ["{name}"]\n', "p.toml"))
            for name in ("right", "faulty")
        )
        return {error.node: error for error in node_errors(model, first, second, IDS, rows)}


@pytest.mark.parametrize("rows", [64, 8])
@pytest.mark.parametrize("name", ["blk.0.attn_v", "blk.1.ffn_gate", "blk.1.rope", "embed", "logits", "blk.0.ffn_add"])
def test_the_error_is_its_own_of_the_node_that_makes_it(model: Model, name: str, rows: int):
    def work(node, tensors):
        compute(node, tensors)
        if node.name == name:
            tensors.outputs[0].mul_(1.5)

    errors = errors_of(model, work, rows)
    wrong = [node for node, error in errors.items() if error.own is not None and error.own > 1e-9]
    assert wrong == [name]
    # One and a half times what it should be; of rope's two results one is.
    assert errors[name].own == pytest.approx(0.25, rel=0.6 if name == "blk.1.rope" else 1e-3)
    after = list(errors)[list(errors).index(name) :]
    gathered = [node for node, error in errors.items() if error.gathered is not None and error.gathered > 1e-9]
    assert set(gathered) <= set(after)
    assert name in gathered
    assert "logits" in gathered


def test_rows_and_heads_are_told(model: Model):
    def work(node, tensors):
        compute(node, tensors)
        if node.name == "blk.1.attention":
            late = range(len(tensors.outputs[0]))[11:]
            tensors.outputs[0][late, 2 * node.head_dim : 3 * node.head_dim] *= -3.0

    found = errors_of(model, work)["blk.1.attention"]
    assert found.rows == (11, len(IDS) - 1)
    assert found.head == 2
    assert found.row in range(11, len(IDS))


def test_what_a_cache_is_given_is_held_against_what_it_should_be(model: Model):
    def work(node, tensors):
        compute(node, tensors)
        if node.name == "blk.0.copy":
            slots = tensors.inputs[2].long()
            tensors.outputs[0].flatten(0, 1)[slots[4:6]] = 9.0

    errors = errors_of(model, work)
    wrong = [node for node, error in errors.items() if error.own is not None and error.own > 1e-9]
    assert wrong == ["blk.0.copy"]
    assert errors["blk.0.copy"].rows == (4, 5)


def test_no_number_is_the_worst_error(model: Model):
    def work(node, tensors):
        compute(node, tensors)
        if node.name == "blk.0.ffn_mul":
            tensors.outputs[0][3, 5] = float("nan")

    found = errors_of(model, work)["blk.0.ffn_mul"]
    assert found.own == float("inf")
    assert (found.row, found.rows) == (3, (3, 3))


def test_narrow_formats_and_fused_nodes_are_held_against_plain_ones(model: Model):
    """torch's kernels of bfloat16 against float32's: each within what it states, and what they read is converted."""
    first = model.plan(use=[EXACT])
    errors = node_errors(model, first, model.plan(use=[EXACT, "mul_mat=torch:bf16"]), IDS)
    own = [error for error in errors if error.kernel == "torch:bf16"]
    assert own
    assert all(error.own is not None and 0 < error.own <= error.stated for error in own)
    assert all(error.gathered is not None for error in own)


def test_looking_changes_nothing(model: Model):
    plan = model.plan(use=[EXACT])
    before = model.forward(IDS, plan)
    node_errors(model, plan, plan, IDS)
    assert torch.equal(model.forward(IDS, plan), before)


@pytest.mark.parametrize("count", [0, 257])
def test_what_cannot_be_run_is_said(model: Model, count: int):
    plan = model.plan(use=[EXACT])
    with pytest.raises(ModelError, match="1 to 256 tokens"):
        node_errors(model, plan, plan, [1] * count)
