"""Two plans by token: held against figures computed in one go from both plans' logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import kernelmux
from fake_backend import FakeKernel, compute, whole_backend
from kernelmux.contract import registry
from kernelmux.debug.compare import compare
from kernelmux.errors import ModelError
from kernelmux.graph.ops import OPS
from kernelmux.run.model import Model

EXACT = "*=torch:f32,torch:sdpa,torch:rows"
TEXTS = [list(range(40, 140)), [7, 9, 30, 31, 32], [5]]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


def plans(model: Model):
    return model.plan(use=[EXACT]), model.plan(use=[EXACT, "mul_mat=torch:bf16"])


@pytest.mark.parametrize("rows", [None, 7])
def test_the_figures_are_those_of_the_logits(model: Model, rows: int | None):
    first, second = plans(model)
    found = compare(model, first, second, TEXTS, rows)
    logits = [[model.forward(ids, plan).double() for plan in (first, second)] for ids in TEXTS]
    p, q = (torch.cat([pair[side] for pair in logits]).log_softmax(-1) for side in (0, 1))
    nats = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == sum(map(len, TEXTS)) == len(nats)
    assert found.divergence == pytest.approx(float(nats.mean()), rel=2e-2)
    assert found.worst[2] == pytest.approx(float(nats.max()), rel=5e-2)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.02)
    for side, perplexity in enumerate(found.perplexity):
        taken = [-pair[side].log_softmax(-1)[range(len(i) - 1), i[1:]] for pair, i in zip(logits, TEXTS, strict=True)]
        surprises = torch.cat(taken)
        spread = 1.96 * float(surprises.std()) / math.sqrt(len(surprises))
        assert perplexity.mean == pytest.approx(math.exp(float(surprises.mean())), rel=1e-3)
        assert perplexity.low == pytest.approx(math.exp(float(surprises.mean()) - spread), rel=1e-2)
        assert perplexity.high == pytest.approx(math.exp(float(surprises.mean()) + spread), rel=1e-2)


def test_a_plan_agrees_with_itself(model: Model):
    plan, _ = plans(model)
    found = compare(model, plan, plan, TEXTS)
    assert (found.divergence, found.agreement, found.parting) == (0.0, 1.0, None)


def test_where_they_part_first_is_told_with_what_each_says_next(model: Model):
    """A backend whose head is upside down from position 12 on."""

    def work(node, tensors):
        compute(node, tensors)
        if node.name == "logits":
            tensors.outputs[0][12:].neg_()

    faulty = whole_backend(**{op: FakeKernel(work=work) for op in OPS})
    with registry.isolated(faulty=faulty, right=whole_backend()):
        first, second = (model.plan(use=[f"*={name}"]) for name in ("right", "faulty"))
        found = compare(model, first, second, [TEXTS[1], TEXTS[0]])
        parting = found.parting
        assert parting is not None
        assert (parting.text, parting.position) == (1, 12)
        logits = model.forward(TEXTS[0], first)[12]
        tokens = int(logits.argmax()), int(logits.argmin())
        assert parting.margin == pytest.approx(float(logits[tokens[0]] - logits[tokens[1]]), rel=1e-4)
        assert parting.before == model.source.tokenizer.decode(TEXTS[0][:13])
        for token, continued in zip(tokens, parting.continued, strict=True):
            assert continued.startswith(model.source.tokenizer.decode([token]).rstrip("�"))


def test_texts_longer_than_the_model_holds_are_read_in_windows(model: Model):
    first, second = plans(model)
    ids = [token % 200 for token in range(600)]
    found, parts = (
        compare(model, first, second, [ids]),
        compare(model, first, second, [ids[:256], ids[256:512], ids[512:]]),
    )
    assert (found.tokens, found.divergence) == (600, parts.divergence)


@pytest.mark.parametrize("texts", [[], [[]], [[1, 2], []]])
def test_texts_without_tokens_are_refused(model: Model, texts):
    with pytest.raises(ModelError, match="one token or more"):
        compare(model, *plans(model), texts)
