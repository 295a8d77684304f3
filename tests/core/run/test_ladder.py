"""The ladder: what steps are padded to."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.run.ladder import all_eager_extents, eager_extents, rung


def plan(*buckets: int):
    """As much of a plan as the ladder asks."""
    return SimpleNamespace(
        buckets=buckets, max_rows=buckets[-1], bucket=lambda rows: next(top for top in buckets if rows <= top)
    )


def test_rungs_are_as_close_as_a_quarter():
    assert [rung(rows) for rows in range(1, 18)] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20]
    assert all(rows <= rung(rows) < 1.25 * rows and rung(rung(rows)) == rung(rows) for rows in range(1, 4097))


steps = st.integers(1, 512).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, rows), st.integers(1, min(rows, 64)))
)


@settings(derandomize=True, deadline=None)
@given(step=steps, buckets=st.sets(st.integers(1, 511)), most=st.integers(1, 64))
def test_a_padded_step_holds_its_own_and_stays_among_the_same_kernels(step, buckets, most):
    rows, outs, seqs = step
    chosen, seqs = plan(*sorted({*buckets, 512})), min(seqs, most)
    found = eager_extents(chosen, rows, outs, seqs, most)
    assert rows <= found["m"] and outs <= found["outs"] <= found["m"] and seqs <= found["seqs"] <= most
    assert chosen.bucket(found["m"]) == chosen.bucket(rows)
    assert chosen.bucket(found["outs"]) == chosen.bucket(outs)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(buckets=st.sets(st.integers(1, 127)), most=st.integers(1, 20), data=st.data())
def test_every_step_that_gives_last_logits_is_among_those_prepared(buckets, most, data):
    chosen = plan(*sorted({*buckets, 128}))
    prepared = [*all_eager_extents(chosen, most)]
    rows = data.draw(st.integers(1, 128))
    seqs = data.draw(st.integers(1, min(most, rows)))
    assert eager_extents(chosen, rows, seqs, seqs, most) in prepared


def test_the_ladder_of_one_sequence_is_short():
    assert len([*all_eager_extents(plan(1, 8, 64, 512), 1)]) == 32
