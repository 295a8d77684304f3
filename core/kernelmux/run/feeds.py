"""What a step is given: each sequence's next tokens, checked, and written as the rows of the step state.

Enters: Feeds. Leaves: the numbers of every state buffer. Touches no device and no page.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kernelmux.run.pages import CachedSequence, CapacityError


@dataclass(frozen=True)
class Feed:
    """What a sequence is given in one step: its next token ids, and whether every row's logits are wanted."""

    sequence: CachedSequence
    ids: Sequence[int]
    all_logits: bool = False


def check_feeds(feeds: Sequence[Feed], batch: int, vocab: int, max_rows: int) -> int:
    """The rows of a step; CapacityError where it is none that the session can run."""
    m = sum(len(feed.ids) for feed in feeds)
    if len(feeds) > batch:
        raise CapacityError(f"a step of {len(feeds)} sequences, the session was made for {batch}")
    if not feeds or not all(feed.ids for feed in feeds):
        raise CapacityError("a step needs at least one sequence, and every sequence at least one token")
    if len({id(feed.sequence) for feed in feeds}) < len(feeds):
        raise CapacityError("a step feeds one sequence twice: join its tokens, or take two steps")
    if odd := [id for feed in feeds for id in feed.ids if not 0 <= id < vocab]:
        raise CapacityError(f"token id {odd[0]} is not in the vocabulary of {vocab}")
    if m > max_rows:
        raise CapacityError(f"a step of {m} tokens, the plan takes {max_rows}: feed fewer at a time")
    return m


def state_rows(feeds: Sequence[Feed], m: int, outs: int, seqs: int) -> Mapping[str, list[int]]:
    """The step state by the buffers' names, but for the block tables, padded to a walk's extents.

    A padding row has slot -1. As far as there are padding sequences each is one of these, of length 0; the others are
    of no sequence, as the last padding sequences have no row. `logit_rows` are those whose logits are wanted, then
    padding.
    """
    ends = list(itertools.accumulate(len(feed.ids) for feed in feeds))
    rows = ends[-1] if ends else 0
    padding = range(rows, m)
    positions = [range(feed.sequence.length, feed.sequence.length + len(feed.ids)) for feed in feeds]
    wanted = [
        row
        for feed, end in zip(feeds, ends, strict=True)
        for row in range(end - (len(feed.ids) if feed.all_logits else 1), end)
    ]
    slots = [feed.sequence.slot(at) for feed, span in zip(feeds, positions, strict=True) for at in span]
    empty = range(len(feeds), seqs)
    return {
        "tokens": [token for feed in feeds for token in feed.ids] + [0 for _ in padding],
        "positions": [position for span in positions for position in span] + [0 for _ in padding],
        "slots": slots + [-1 for _ in padding],
        "logit_rows": [*wanted, *(min(row, m - 1) for row in range(rows, rows + outs - len(wanted)))],
        "query_start": [0, *ends, *(min(rows + count, m) for count in range(1, len(empty) + 1))],
        "kv_len": [span.stop for span in positions] + [0 for _ in empty],
    }
