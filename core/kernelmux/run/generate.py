"""Token ids after a prompt.

Enters: a session, the prompt's ids, how to draw. Leaves: ids one by one. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from kernelmux.run.feeds import Feed
from kernelmux.run.pages import CachedSequence
from kernelmux.run.sampling import Sampler, Sampling
from kernelmux.run.session import Session


def generate(
    session: Session, ids: Sequence[int], sampling: Sampling, end_ids: frozenset[int], max_tokens: int
) -> Iterator[int]:
    """Token ids after a prompt, up to and with an end token, at most `max_tokens`."""
    sampler = sampling.sampler(ids)
    sequence = session.open()
    try:
        token = sampler(session.feed(sequence, ids)[-1])
        yield token
        if token in end_ids:
            return
        # Closed at once: until then a decode has the session to itself.
        with closing(_following(session, sequence, token, sampler, max_tokens - 1)) as rest:
            for following in rest:
                yield following
                if following in end_ids:
                    return
    finally:
        session.close(sequence)


def _following(
    session: Session, sequence: CachedSequence, token: int, sampler: Sampler, count: int
) -> Generator[int, None, None]:
    """`count` tokens after `token`."""
    if sampler.greedy:
        with closing(session.decode([sequence], [token], count)) as steps:
            for (following,) in steps:
                yield following
        return
    for _ in range(count):
        token = sampler(session.step([Feed(sequence, [token])])[-1])
        yield token
