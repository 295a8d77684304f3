"""How far a plan's next tokens are from those of a more exact plan: the Kullback-Leibler divergence over a text.

Enters: a model, two plans for it, token ids. Leaves: nats a token. KL(p || q) = sum p (log p - log q), in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from kernelmux.errors import ModelError
from kernelmux.plan.plan import Plan
from kernelmux.run.model import Model
from kernelmux.run.replaced import Replaced

if TYPE_CHECKING:
    import torch

ROWS_AT_ONCE = 64
"""Rows of logits that are held in float64 at a time."""


def prose() -> str:
    """English text of some 2,000 tokens, varied: descriptions, a dialogue, code, numbers, a letter."""
    return resources.files("kernelmux.run").joinpath("prose.txt").read_text("utf-8")


def divergence(model: Model, plan: Plan, exact: Plan, ids: Sequence[int], rows: int | None = None) -> float:
    """The mean KL divergence of what `plan` says comes next from what `exact` says, in nats, over all of `ids`.

    The plan is fed `rows` tokens a step, as many as it takes unless told: 1 measures the kernels that decode. Logits
    are held a step of the exact plan at a time. ModelError where there is no token, or not room for them all.
    """
    pairs = logits_of_both(model, plan, exact, ids, rows)
    return sum(float(nats_by_row(wanted, found).sum()) for wanted, found in pairs) / len(ids)


def logits_of_both(
    model: Model,
    plan: Plan,
    exact: Plan,
    ids: Sequence[int],
    rows: int | None = None,
    replaced: set[Replaced] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For some tokens at a time the logits [tokens, vocabulary] of the exact plan and of the other, as `divergence`.

    Kernels that raised and gave way to others are added to `replaced`.
    """
    step = plan.max_rows if rows is None else min(rows, plan.max_rows)
    if not ids or len(ids) > model.source.shape.context or step < 1:
        raise ModelError(
            f"a divergence is taken over 1 to {model.source.shape.context} tokens in steps of one row or more, "
            f"not over {len(ids)} in steps of {rows}"
        )
    ours, theirs = model.session(plan, len(ids)), model.session(exact, len(ids))
    sequence, expected = ours.open(), theirs.open()
    for start in range(0, len(ids), exact.max_rows):
        window = ids[start : start + exact.max_rows]
        wanted = theirs.feed(expected, window, all_logits=True)
        for at in range(0, len(window), step):
            yield wanted[at : at + step], ours.feed(sequence, window[at : at + step], all_logits=True)
    if replaced is not None:
        replaced.update(ours.replaced, theirs.replaced)


def nats_by_row(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Of logits [rows, vocabulary] each: the divergence of each row, float64 [rows]."""
    import torch

    parts = []
    for at in range(0, len(wanted), ROWS_AT_ONCE):
        rows = slice(at, at + ROWS_AT_ONCE)
        p = wanted[rows].double().log_softmax(-1)
        q = found[rows].to(p.device).double().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)
