"""Token ids after a prompt.

Enters: a session, the prompt's ids, how to draw. Leaves: ids one by one. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from kernelmux.run.drawing import draw_next
from kernelmux.run.host import plainly
from kernelmux.run.pages import CachedSequence
from kernelmux.run.sampling import Sampler, Sampling
from kernelmux.run.session import Session
from kernelmux.run.soundness import check_highest


@plainly
def generate(
    session: Session, ids: Sequence[int], sampling: Sampling, end_ids: frozenset[int], max_tokens: int
) -> Iterator[int]:
    """Token ids after a prompt, up to and with an end token, at most `max_tokens`.

    LogitsError where logits are NaN or infinite.
    """
    sequence = session.open()
    try:
        yield from continued(session, sequence, ids, sampling.sampler(ids), end_ids, max_tokens)
    finally:
        session.close(sequence)


@plainly
def continued(
    session: Session,
    sequence: CachedSequence,
    ids: Sequence[int],
    sampler: Sampler,
    end_ids: frozenset[int],
    max_tokens: int,
) -> Generator[int, None, None]:
    """The same after more ids of a sequence, which stays open: what was fed of it is told by its length."""
    logits = session.feed(sequence, ids)[-1]
    check_highest(logits.amax()[None], session.plan, [sequence])
    token = draw_next(sampler, logits)
    yield token
    if token in end_ids or max_tokens == 1:
        return
    # Closed at once: until then a decode has the session to itself.
    with closing(session.decode([sequence], [token], max_tokens - 1, [sampler])) as steps:
        for (following,) in steps:
            yield following
            if following in end_ids:
                return
