"""Token ids after a prompt.

Enters: a session, the prompt's ids, how to draw. Leaves: ids one by one. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from kernelmux.run.drawing import draw_next
from kernelmux.run.host import plainly
from kernelmux.run.sampling import Sampling
from kernelmux.run.session import Session


@plainly
def generate(
    session: Session, ids: Sequence[int], sampling: Sampling, end_ids: frozenset[int], max_tokens: int
) -> Iterator[int]:
    """Token ids after a prompt, up to and with an end token, at most `max_tokens`."""
    sampler = sampling.sampler(ids)
    sequence = session.open()
    try:
        token = draw_next(sampler, session.feed(sequence, ids)[-1])
        yield token
        if token in end_ids:
            return
        # Closed at once: until then a decode has the session to itself.
        with closing(session.decode([sequence], [token], max_tokens - 1, [sampler])) as steps:
            for (following,) in steps:
                yield following
                if following in end_ids:
                    return
    finally:
        session.close(sequence)
