"""The ladder: the few sizes that steps are padded to, so that a step of new sizes finds everything bound.

Enters: how many rows, wanted logits and sequences a step has. Leaves: the extents of the walk that runs it.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelmux.plan.plan import Plan

Extents = dict[str, int]
"""A walk's: `m` rows, `outs` of which give logits, `seqs` sequences."""


def rung(rows: int) -> int:
    """The least row count of the ladder that holds so many: up to 8 each, then four between two powers of two."""
    step = max((1 << (rows - 1).bit_length()) // 8, 1)
    return -(-rows // step) * step


def step_rows(tokens: int, most: int) -> set[int]:
    """The row counts of the steps that read so many tokens, `most` at a time."""
    return {min(tokens, most), tokens % most} - {0}


def eager_extents(plan: Plan, rows: int, outs: int, seqs: int, most: int) -> Extents:
    """The extents of an eager step: none is so large that the plan would choose other kernels for it.

    Logits and sequences are padded to powers of two; `most` sequences are all that the session has.
    """
    m = min(rung(rows), plan.bucket(rows))
    return {"m": m, "outs": min(_power(outs), plan.bucket(outs), m), "seqs": min(_power(seqs), most)}


def all_eager_extents(plan: Plan, most: int) -> Iterator[Extents]:
    """Of all eager steps of up to `most` sequences that give each one's last logits, the extents."""
    seqs = sorted({min(_power(count), most) for count in range(1, most + 1)})
    rows = sorted({min(rung(count), plan.bucket(count)) for count in range(1, plan.max_rows + 1)})
    for m in rows:
        for count in seqs:
            # A step has a row of each sequence at least.
            if count == 1 or count // 2 < m:
                yield eager_extents(plan, m, min(count, m), count, most)


def captured_extents(rows: int) -> Extents:
    """The extents of a captured step: its rows are sequences that decode, or padding."""
    return {"m": rows, "outs": rows, "seqs": rows}


def _power(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()
