"""Sequences over a paged cache: step state filled in, the plan walked.

Enters: a plan, a model's weights, token ids. Leaves: logits, or ids step by step. All of a session's work
is on one stream, whatever becomes of its plan. Where the device has graphs, a step of one token a sequence is padded to
a captured one: the device feeds itself the likeliest or drawn tokens, and the host reads them while the next step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING

from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import KernelmuxError, LaunchError
from kernelmux.graph.graph import PAGE_SIZE
from kernelmux.plan.plan import Plan
from kernelmux.run.buffers import make_buffers
from kernelmux.run.capture import CapturedWalk, captured_rows
from kernelmux.run.drawing import Drawing
from kernelmux.run.feeds import Feed, check_feeds, state_rows
from kernelmux.run.host import check_process, plainly
from kernelmux.run.ladder import Extents, all_eager_extents, captured_extents, eager_extents, step_rows
from kernelmux.run.nucleus import Way, highest
from kernelmux.run.pages import CachedSequence, CapacityError, Pages
from kernelmux.run.progress import CAPTURING, Progress
from kernelmux.run.replaced import Replaced, replaced
from kernelmux.run.sampling import Sampler, Sampling, each_sampler
from kernelmux.run.soundness import check_highest, mark, read_ids
from kernelmux.run.state import HostCopy, StreamOrder, in_line
from kernelmux.run.walk import Walk
from kernelmux.run.walker import Walker
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    import torch


Ids = Generator[list[int], None, None]
"""The next ids of each sequence, step by step."""


class BusyError(KernelmuxError):
    """A session was asked for something while it was at work: it is for one caller at a time."""


class Session:
    """A plan at work: one paged cache, any number of sequences in it, steps over batches of them.

    `tokens` is the cache's capacity over all sequences, `sequences` the largest batch. It is for one caller at a time:
    while a call runs, or a decode has not ended, any other raises BusyError, from whatever thread.
    """

    @plainly
    def __init__(self, plan: Plan, packed: PackedWeights, tokens: int, sequences: int = 1) -> None:
        import torch

        if tokens < 1 or sequences < 1:
            raise CapacityError(f"a session holds at least 1 token of 1 sequence, not {tokens=} and {sequences=}")
        platform = plan.device.platform
        check_process(plan.device)
        # Each sequence may waste the rest of its last page.
        pages = -(-tokens // PAGE_SIZE) + sequences - 1
        self._pages = Pages(pages)
        self._batch = sequences
        # A captured step may have more rows than it has sequences.
        self._most = 1 << (sequences - 1).bit_length() if platform.captures else sequences
        platform.check_here(plan.device)
        self._state, leaf_buffers = make_buffers(plan, packed, self._most, pages)
        self.walker = Walker(plan, packed, leaf_buffers, self._state.host, platform.stream(plan.device))
        self._logits = plan.graph.outputs[0]
        vocab = plan.graph.values[self._logits].shape[1]
        assert isinstance(vocab, int)
        self._vocab = vocab
        self._marked = torch.zeros(self._most, dtype=torch.float32, device=plan.device.torch)
        """The ids of a captured step, as `mark` writes them."""
        self._tails: dict[Way | None, Callable[[Walk], None]] = {}
        self._at_work = Lock()
        self.packed_cache = packed.cache
        """Where packed weights are kept on disk, with what is to be told of it; None where nobody asked for it."""
        self.replaced: list[Replaced] = []
        """The kernels that raised and gave way to others, as they did."""

    @property
    def plan(self) -> Plan:
        """The plan that it walks: not the one that it was made with, once a kernel was replaced."""
        return self.walker.plan

    @contextmanager
    def watched(self, observer: Observer) -> Iterator[None]:
        """Every launch of the walks within the block that the observer wants passes before it; results are the same."""
        with self.walker.watch.by(observer):
            yield

    @cached_property
    def drawing(self) -> Drawing:
        """How tokens are drawn where they are not just the likeliest."""
        return Drawing(self._most, self._vocab, self.plan.device)

    @plainly
    def prepare(self, rows: Collection[int] | None = None, sampling: Sampling | None = None) -> Iterator[Progress]:
        """Packs all weights, then compiles, binds and captures for steps of so many `rows`: a step does none of it.

        Unless told, for all that the session can run: prompts, decoding, batches of both; with a `sampling` also for
        decoding that draws by such settings. With no rows it only packs. Without it, the first steps of their extents
        do it.
        """
        for count in rows or ():
            self.plan.bucket(count)
        yield from self._prepared(lambda: self._prepare(rows, Way.of([sampling or Sampling()])))

    @plainly
    def prepare_logits(self, tokens: int) -> Iterator[Progress]:
        """The same for one `feed` of so many tokens that returns the logits of all, but for what only later ones need.

        Nothing is captured, and no step is made that nobody reads.
        """
        rows = step_rows(tokens, self.plan.max_rows)
        steps = [eager_extents(self.plan, count, count, 1, self._most) for count in rows]
        yield from self._prepared(lambda: self.walker.prepare(steps))

    def _prepared(self, prepare: Callable[[], Iterator[Progress]]) -> Iterator[Progress]:
        """Prepares, and where a kernel raises again without it."""
        with self._alone():
            while True:
                try:
                    yield from prepare()
                    break
                except LaunchError as error:
                    self._do_without(error)
            if self.packed_cache is not None:
                self.packed_cache.start()

    def _prepare(self, rows: Collection[int] | None, way: Way | None) -> Iterator[Progress]:
        if rows is None:
            eager = [*all_eager_extents(self.plan, self._most)]
            decoding = range(1, self._batch + 1)
        else:
            eager = [eager_extents(self.plan, count, 1, 1, self._most) for count in rows]
            decoding = range(1, 2) if 1 in rows else range(0)
        sizes = {size for count in decoding if (size := captured_rows(self.plan, count)) is not None}
        alone = [captured_extents(size) for size in sorted(sizes)]
        steps = [*alone, *(extents for extents in eager if extents not in alone)]
        yield from self.walker.prepare(steps)
        platform = self.plan.device.platform
        if not platform.captures:
            return
        # Weights were packed on the caller's stream.
        platform.synchronize(self.plan.device)
        for count, extents in enumerate(steps, 1):
            # Of padding alone, so that it changes nothing: libraries take their time at a call's first time.
            self._write_state([], extents)
            with self._on_stream():
                if extents in alone:
                    for each in {None, way}:
                        self._capture(extents["m"], each)
                else:
                    self.walker.bind(**extents).rehearse()
            yield Progress(CAPTURING, count, len(steps))

    def open(self) -> CachedSequence:
        """A new, empty sequence."""
        return self._pages.open()

    def close(self, sequence: CachedSequence) -> None:
        """Gives a sequence's pages back; it cannot be fed any more, and closing it again does nothing."""
        with self._alone():
            self._pages.give_back(sequence)

    def skip(self, sequence: CachedSequence, tokens: int) -> None:
        """Takes a sequence so many tokens on that nobody computes: what the cache holds there is read as it is.

        For timing a step at a length. CapacityError where there is no room for them.
        """
        with self._alone():
            self._pages.check([sequence])
            self._pages.reserve([sequence], [tokens])
            sequence.length += tokens

    @plainly
    def step(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """Runs one step over several sequences, and returns logits [rows wanted, vocabulary], in the order of `feeds`.

        Of each feed the last row's logits, or all rows' where it says so. The next step overwrites what is returned.
        CapacityError where rows, sequences or tokens are more than the session was made for; nothing has changed then.
        """
        with self._alone():
            return self._step(feeds)

    @plainly
    def feed(self, sequence: CachedSequence, ids: Sequence[int], all_logits: bool = False) -> torch.Tensor:
        """Runs tokens in as many steps as the plan needs; returns a copy of the logits, of the last row or of all."""
        import torch

        if not ids:
            raise CapacityError("a step needs at least one sequence, and every sequence at least one token")
        chunk = self.plan.max_rows
        steps = [[Feed(sequence, ids[at : at + chunk], all_logits)] for at in range(0, len(ids), chunk)]
        with self._alone():
            # All of it before any of it: a prompt that does not fit leaves the sequence as it was.
            counts = [self._check(feeds) for feeds in steps]
            self._pages.reserve([sequence], [len(ids)])
            logits = [self._run_checked(feeds, m).clone() for feeds, m in zip(steps, counts, strict=True)]
        return torch.cat(logits) if all_logits else logits[-1]

    @plainly
    def decode(
        self,
        sequences: Sequence[CachedSequence],
        tokens: Sequence[int],
        steps: int,
        sampling: Sampling | Sequence[Sampling | Sampler] | None = None,
    ) -> Ids:
        """Feeds each sequence its token and then, again and again, the next one: yields `steps` lists of ids.

        The next one is the likeliest, or drawn: `sampling` is one for all or one a sequence. A Sampling draws its
        seed's first numbers, and knows the token that is fed as one that was before; a Sampler draws on, and knows
        afterwards of what was yielded. Room for all steps is reserved at once. What was yielded is in the cache, but
        for the last ids. From its first ids to its end, or until it is closed, it has the session to itself: the next
        step's state is on the device. LogitsError takes the place of ids where a sequence's logits are NaN or infinite.
        """
        if len(sequences) != len(tokens):
            raise CapacityError(
                f"decode takes a token for each sequence: {len(sequences)} sequences, {len(tokens)} tokens"
            )
        samplers = each_sampler(sampling or Sampling(), tokens)
        feeds = [Feed(sequence, [token]) for sequence, token in zip(sequences, tokens, strict=True)]
        with self._alone():
            self._check(feeds)
            self._pages.reserve(sequences, [steps] * len(feeds))
            way = Way.of([sampler.sampling for sampler in samplers])
            with self._on_stream():
                walk = self.captured_step(feeds, way)
                if way is not None:
                    self.drawing.start(samplers)
            if walk is not None:
                yield from self._decode_on_device(walk, sequences, steps, None if way is None else self.drawing)
            else:
                yield from self._decode_eagerly(feeds, steps, way)

    def _decode_eagerly(self, feeds: Sequence[Feed], steps: int, way: Way | None) -> Ids:
        for _ in range(steps):
            logits = self._step(feeds)
            most, likeliest = logits.max(dim=-1)
            check_highest(most, self.plan, [feed.sequence for feed in feeds])
            if way is None:
                ids = likeliest.tolist()
            else:
                self.drawing.send()
                ids = self.drawing.draw(logits, way).tolist()
                self.drawing.take(ids)
            yield ids
            feeds = [Feed(feed.sequence, [token]) for feed, token in zip(feeds, ids, strict=True)]

    def _decode_on_device(
        self, walk: CapturedWalk, sequences: Sequence[CachedSequence], steps: int, drawing: Drawing | None
    ) -> Ids:
        """The ids of a step are read when the next one has been launched: the device never waits for the host."""
        # A graph runs on any stream: the caller's costs no switching.
        order = StreamOrder(self.plan.device)
        copies = [self.ids_copy(len(sequences)) for _ in range(2)]
        for index in range(steps + 1):
            if index < steps:
                order.keep()
                if drawing is not None:
                    drawing.send()
                walk()
                copies[index % 2].start()
            if index:
                marked = copies[(index - 1) % 2].wait()
                for sequence in sequences:
                    sequence.length += 1
                ids = read_ids(marked, self.plan, sequences)
                if drawing is not None:
                    drawing.take(ids)
                yield ids

    @plainly
    def captured_step(self, feeds: Sequence[Feed], way: Way | None = None) -> CapturedWalk | None:
        """The captured step of one token a sequence, its state written; None where the plan captures none.

        Each call of it decodes one token more of each sequence, as far as there is room: the likeliest, or as `drawing`
        was started.
        """
        while (rows := self._padded(feeds)) is not None:
            self._write_state(feeds, captured_extents(rows))
            try:
                return self._capture(rows, way)
            except LaunchError as error:
                self._do_without(error)
        return None

    def ids_copy(self, count: int) -> HostCopy:
        """A place in host memory for the next tokens of `count` sequences, marked where there are none."""
        return HostCopy(self._marked[:count], self.plan.device)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """BusyError where the session is at work already, in another thread or in a decode that has not ended."""
        check_process(self.plan.device)
        if not self._at_work.acquire(blocking=False):
            raise BusyError(
                "the session is at work, in another thread or in a decode or prepare that has neither ended nor been "
                "closed: take one session a thread (they share the packed weights), and close what is left early"
            )
        try:
            with nullcontext() if self.packed_cache is None else self.packed_cache.background.in_use():
                yield
        finally:
            self._at_work.release()

    def _on_stream(self) -> AbstractContextManager[None]:
        """Work on the session's stream, in line with the caller's."""
        return in_line(self.plan.device, self.walker.stream)

    def _check(self, feeds: Sequence[Feed]) -> int:
        """The rows of a step; CapacityError where it is none that the session can run."""
        self._pages.check([feed.sequence for feed in feeds])
        return check_feeds(feeds, self._batch, self._vocab, self.plan.max_rows)

    def _step(self, feeds: Sequence[Feed]) -> torch.Tensor:
        m = self._check(feeds)
        self._pages.reserve([feed.sequence for feed in feeds], [len(feed.ids) for feed in feeds])
        return self._run_checked(feeds, m)

    def _run_checked(self, feeds: Sequence[Feed], m: int) -> torch.Tensor:
        """A step of `m` rows that can be run, and for which there is room."""
        with self._on_stream():
            logits = self._run(feeds, m)
        for feed in feeds:
            feed.sequence.length += len(feed.ids)
        return logits

    def _run(self, feeds: Sequence[Feed], m: int) -> torch.Tensor:
        """Walks once, and returns the logits.

        Where a kernel raises and the policy says `next`, walks again without it: a step may be run again, for its state
        is written again, and what it has written to the cache is written over.
        """
        outs = sum(len(feed.ids) if feed.all_logits else 1 for feed in feeds)
        while True:
            rows = self._padded(feeds)
            if rows is None:
                extents = eager_extents(self.plan, m, outs, len(feeds), self._most)
            else:
                extents = captured_extents(rows)
            self._write_state(feeds, extents)
            try:
                walk = self.walker.bind(**extents) if rows is None else self._capture(rows)
                walk()
            except LaunchError as error:
                self._do_without(error)
            else:
                logits: torch.Tensor = walk.outputs[self._logits][:outs]
                return logits

    def _padded(self, feeds: Sequence[Feed]) -> int | None:
        """The rows of the captured step for these feeds; None where it runs eagerly."""
        alone = all(len(feed.ids) == 1 for feed in feeds)
        return captured_rows(self.plan, len(feeds)) if alone else None

    def _do_without(self, error: LaunchError) -> None:
        """Replaces the kernel that raised, or raises the error."""
        before, self.walker = self.plan, self.walker.without(error)
        self.replaced.append(replaced(error, before, self.plan))

    def _capture(self, rows: int, way: Way | None = None) -> CapturedWalk:
        """The captured step of so many rows, after which each gets its likeliest token, or one that is drawn."""
        if way is not None:
            self.drawing.rehearse(rows, way)
        tail = self._tails.setdefault(way, partial(self._advance, way))
        return self.walker.capture(tail, **captured_extents(rows))

    def _advance(self, way: Way | None, walk: Walk) -> None:
        """On the device, the state of the next step: each sequence with a length gets its token."""
        logits = walk.outputs[self._logits]
        if way is None:
            most, ids = logits.max(dim=-1)
        else:
            most, ids = highest(logits), self.drawing.draw(logits, way)
        mark(ids, most, self._marked[: len(ids)])
        self._state.advance(ids)

    def _write_state(self, feeds: Sequence[Feed], extents: Extents) -> None:
        """Fills the step's buffers, with padding up to a walk's extents."""
        self._state.write(state_rows(feeds, **extents), {"block_table": [feed.sequence.pages for feed in feeds]})
