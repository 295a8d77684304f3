"""A conversation with a model: messages through its chat template, the cache kept from one answer to the next.

Enters: what the user says. Leaves: answers, piece by piece. Only what is new is read: where the text of all messages
goes on from what the cache holds, the rest of it; else, as where a template rewrites what was said, all of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

from kernelmux.errors import ModelError
from kernelmux.models.quoting import after
from kernelmux.plan.plan import Plan
from kernelmux.run.generate import continued
from kernelmux.run.model import PROMPT_OPTIONS, Model, PromptOptions
from kernelmux.run.progress import Progress
from kernelmux.run.sampling import Sampling

Message = dict[str, str]


class Chat:
    """A conversation over a session of its own, with a cache of `tokens` tokens; answers have at most `max_tokens`."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        sampling: Sampling,
        tokens: int,
        max_tokens: int,
        system: str = "",
        *,
        cache_packed: bool = False,
        options: PromptOptions = PROMPT_OPTIONS,
    ) -> None:
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._first = len(self.messages)
        # A file without a template had better be refused before anybody says something.
        model.render([*self.messages, _said("user", "")], options)
        self._model = model
        self._options = options
        self._tokens = tokens
        self._max_tokens = max_tokens
        self.session = model.session(plan, tokens, cache_packed=cache_packed)
        self._sampling = sampling
        self._sampler = sampling.sampler()
        self._sequence = self.session.open()
        self._held: list[int] = []
        """The ids that the cache holds."""
        self.kept = 0
        """Ids of the last question that the cache held already."""
        self.dropped = 0
        """Messages that the last question left out, the oldest ones, for there was no room for them."""
        self.cut = False
        """Whether the last answer ended for want of room or at `max_tokens`."""

    def prepare(self) -> Iterator[Progress]:
        """Packs, compiles, binds and captures what a decoding step needs; prompts of each length bind their own."""
        yield from self.session.prepare({1}, self._sampling)

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer to what the user says, piece by piece. Left early, what has come of it is part of the chat.

        ModelError for a message that the cache has no room for, which is no part of the chat then.
        """
        self.messages.append(_said("user", text))
        try:
            ids, whole = self._unread()
        except ModelError:
            self.messages.pop()
            raise
        tokenizer = self._model.source.tokenizer
        stream, pieces, answer = tokenizer.stream(after=ids[-1]), list[str](), list[int]()
        most = min(self._max_tokens, self._tokens - whole + 1)
        self._sampler.seen.update(self._held, ids)
        self.cut = False
        steps = continued(self.session, self._sequence, ids, self._sampler, tokenizer.end_ids, most)
        try:
            with closing(steps):
                for token in steps:
                    answer.append(token)
                    if token not in tokenizer.end_ids and (piece := stream.push(token)):
                        pieces.append(piece)
                        yield piece
            self.cut = answer[-1] not in tokenizer.end_ids
            if rest := stream.flush():
                pieces.append(rest)
                yield rest
        finally:
            self._held = [*self._held, *ids, *answer][: self._sequence.length]
            self.messages.append(_said("assistant", "".join(pieces)))

    def _unread(self) -> tuple[list[int], int]:
        """The ids to read, after which an answer comes, and how many there are with those in the cache."""
        self.dropped = 0
        wanted = min(self._max_tokens, self._tokens // 2)
        while True:
            ids = self._after_held()
            self.kept = len(self._held) if ids else 0
            ids = ids or self._model.encode(self.messages, self._options)
            whole = self.kept + len(ids)
            earlier = len(self.messages) - self._first - 1
            if whole + wanted <= self._tokens or (not earlier and whole <= self._tokens):
                break
            if not earlier:
                longest = self._model.source.shape.longest
                more = f", or have the chat hold up to {longest} (--context)" if longest > self._tokens else ""
                raise ModelError(f"the message makes {whole} tokens, the chat holds {self._tokens}: shorten it{more}")
            del self.messages[self._first : self._first + 2]
            self.dropped += 2
        if not self.kept:
            self.session.close(self._sequence)
            self._sequence, self._held = self.session.open(), []
        return ids, whole

    def _after_held(self) -> list[int]:
        """The ids of what all messages say beyond what the cache holds; none where they do not go on from there."""
        tokenizer = self._model.source.tokenizer
        if not self._held or not tokenizer.goes_on:
            return []
        text, quote = self._model.rendered(self.messages, self._options)
        try:
            held = tokenizer.text_bytes(self._held).decode()
        except UnicodeDecodeError:  # It ends within a character.
            return []
        if not (text.replace(quote, "") if quote else text).startswith(held):
            return []
        rest = after(text, quote, len(held))
        return tokenizer.encode(rest, add_special=False, parse_special=True, after=self._held[-1], quote=quote)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
