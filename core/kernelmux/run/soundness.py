"""Whether tokens follow from logits at all: none do where a row's highest is NaN or infinite.

Enters: the highest logit of each row, with a captured step the ids too. Leaves: ids that the host may use, or a
LogitsError. A device goes on by its own ids, which lie in the vocabulary whatever the logits are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelmux.errors import LogitsError
from kernelmux.plan.plan import Plan
from kernelmux.run.pages import CachedSequence

if TYPE_CHECKING:
    import torch


def check_highest(highest: torch.Tensor, plan: Plan, sequences: Sequence[CachedSequence]) -> None:
    """LogitsError where the highest logit [rows] of a sequence is NaN or infinite; waits for the device."""
    for value, sequence in zip(highest.tolist(), sequences, strict=True):
        if not math.isfinite(value):
            raise _error(plan, sequence)


def mark(ids: torch.Tensor, highest: torch.Tensor, out: torch.Tensor) -> None:
    """Writes ids [rows] as float32, which holds them below 2^24, and NaN where the highest logit is NaN or infinite.

    One launch, on the device; `read_ids` is what the host makes of it.
    """
    import torch

    # Nothing times what is finite is nothing, and times anything else NaN.
    torch.add(ids, highest.float(), alpha=0, out=out)


def read_ids(marked: Sequence[float], plan: Plan, sequences: Sequence[CachedSequence]) -> list[int]:
    """The ids of what `mark` wrote; LogitsError where a sequence has none."""
    try:
        return [int(number) for number in marked]
    except ValueError:  # What Python says of NaN.
        row = next(row for row, number in enumerate(marked) if math.isnan(number))
        raise _error(plan, sequences[row]) from None


def _error(plan: Plan, sequence: CachedSequence) -> LogitsError:
    """What to say of the logits after all that a sequence has, and how to find the node that they are from."""
    return LogitsError(
        f"token {sequence.length + 1}, counted from the prompt's first, has no logits to take it by: those of "
        f"{plan.graph.name} are NaN or infinite, with {plan.policy.source}. `kernelmux run --check-nan` names the "
        "first node that makes such numbers; where they are not there with --exact or --use '*=reference', a kernel is "
        "at fault, and `kernelmux bisect` finds which; else it is the model's weights"
    )
