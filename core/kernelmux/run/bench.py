"""A whole model, timed: prompts read, tokens decoded, single steps, what Python costs, and the memory that is held."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from kernelmux.measure.timing import LONGEST, Timing
from kernelmux.measure.works import Batch
from kernelmux.plan.plan import Plan
from kernelmux.run.capture import captured_rows
from kernelmux.run.feeds import Feed
from kernelmux.run.model import Model
from kernelmux.run.nucleus import Way
from kernelmux.run.pages import CachedSequence
from kernelmux.run.progress import Progress
from kernelmux.run.replaced import Replaced
from kernelmux.run.sampling import Sampling
from kernelmux.run.session import Session

PROMPTS = 5
"""Times that the prompt is read, after once to warm up."""
DECODES = 3
"""Times that the tokens are decoded, after once to warm up."""
ROUNDS = 9
"""Times that a step, or a row of steps that decode, is timed, unless that takes longer than LONGEST."""
ROUND_SECONDS = 0.05
"""What a row of steps that decode lasts at least, so that its own start does not show, unless it has STEPS of them."""
STEPS = 32
IN_A_ROW = 8
"""Steps that are enqueued at once to tell what one costs: a decoding session never waits for its device to be idle."""
AHEAD = 2
"""Steps that a decoding session has launched when it gives the first ids."""


@dataclass(frozen=True)
class Load:
    """What to time: a prompt of so many tokens; then `decode` steps of `batch` sequences, each `context` long.

    Each step's tokens are the likeliest, or drawn as `sampling` says.
    """

    prompt: int = 512
    context: int = 512
    batch: int = 1
    decode: int = 64
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def work(self) -> str:
        """A decode step of it, as a table names it."""
        asked = {each.name: getattr(self.sampling, each.name) for each in fields(Sampling)}
        others = [f"{name} {value:g}" for name, value in asked.items() if value != getattr(Sampling(), name)]
        return ", ".join([f"{self.batch} x {self.context}", *others])

    @property
    def tokens(self) -> int:
        """Cached tokens that this needs at once."""
        return max(self.prompt, self.batch * (self.context + self.decode))


@dataclass(frozen=True)
class ModelTiming:
    """Medians with their spread, and bytes held on the device."""

    load: Load
    prefill: Timing
    """Microseconds of a whole prompt."""
    decode: Timing
    """Microseconds a step."""
    host: Timing | None
    """Microseconds of a step in Python: until it is enqueued; None where it is not captured."""
    launches: int
    memory: dict[str, int]
    replaced: tuple[Replaced, ...] = ()
    """Kernels that raised meanwhile: what took their place was timed."""
    notes: tuple[str, ...] = ()
    """What is to be told of packed weights that are kept on disk."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.load.prompt / self.prefill.median * 1e6

    @property
    def decode_rate(self) -> float:
        """Tokens a second, of all sequences."""
        return self.load.batch / self.decode.median * 1e6

    def rows(self) -> list[dict[str, Any]]:
        """What a table shows."""
        load = self.load
        rows = [
            _row(f"prompt of {load.prompt}", "tokens/s", self.prefill, load.prompt * 1e6, ""),
            _row(f"decode at {load.work}", "tokens/s", self.decode, load.batch * 1e6, self.launches),
        ]
        if self.host is not None:
            rows.append(_row(f"Python, a step at {load.work}", "us", self.host, None, self.launches))
        return rows


def _row(work: str, unit: str, timing: Timing, per_second: float | None, launches: int | str) -> dict[str, Any]:
    figures = [timing.median, timing.p10, timing.p90]
    if per_second is not None:
        figures = [per_second / microseconds for microseconds in figures]
    median, *spread = (round(figure, 1) for figure in figures)
    return {"work": work, "unit": unit, "median": median, "p10 to p90": sorted(spread), "launches": launches}


def time_model(
    model: Model,
    plan: Plan,
    load: Load,
    tell: Callable[[Progress], object] = lambda progress: None,
    cache_packed: bool = False,
    looking: Callable[[Session], AbstractContextManager[None]] = lambda session: nullcontext(),
) -> ModelTiming:
    """Times a model with a plan, telling how far it is; CapacityError where the plan has fewer rows than the batch.

    With `cache_packed` packed weights are kept on disk, and taken from there, as `Model.session` has it. All that is
    timed is timed within `looking`, as under the eyes of an observer.
    """
    session = prepared_session(model, plan, load.tokens, load.batch, tell, cache_packed)
    with looking(session):
        return _timed(model, session, load, tell)


def _timed(model: Model, session: Session, load: Load, tell: Callable[[Progress], object]) -> ModelTiming:
    plan = session.plan
    wait = partial(plan.device.platform.synchronize, plan.device)
    prompts = []
    for count in range(PROMPTS + 1):
        tell(Progress("timing prompts", count, PROMPTS + 1))
        prompts.append(time_prompt(session, random_ids(model, load.prompt, 0), wait))
    sequences = [session.open() for _ in range(load.batch)]
    for index, sequence in enumerate(sequences):
        session.feed(sequence, random_ids(model, load.context, index))
    decodes = []
    for count in range(DECODES + 1):
        tell(Progress("timing decoding", count, DECODES + 1))
        decodes.append(time_decoding(session, sequences, load.decode, wait, load.sampling))
    host = None
    plan = session.plan
    if captured_rows(plan, load.batch) and load.decode >= AHEAD + IN_A_ROW:
        host = Timing.of(_time_enqueueing(session, sequences, load.decode, wait, load.sampling))
    launches = plan.schedule(load.batch, load.batch).launches
    prefill, steps = Timing.of(prompts[1:]), Timing.of(decodes[1:])
    memory, cache = _memory(plan, load), session.packed_cache
    if cache is not None:
        memory["weights from the cache on disk"] = cache.mapped_bytes
    notes = () if cache is None else tuple(cache.notes)
    return ModelTiming(load, prefill, steps, host, launches, memory, tuple(session.replaced), notes)


def time_step(model: Model, plan: Plan, rows: int, context: int) -> Timing:
    """Times one step as a session runs it: `rows` sequences decode at `context` cached tokens, or a prompt is read.

    Which of the two is as `Batch.of` has it. The cached tokens are computed by nobody: the cache is zeros. PlanError
    where the plan takes fewer rows.
    """
    plan.bucket(rows)
    batch = Batch.of(rows, context)
    session = prepared_session(model, plan, batch.sequences * (batch.length + STEPS), batch.sequences)
    wait = partial(plan.device.platform.synchronize, plan.device)
    if batch.rows > 1:
        return Timing.of(_rounds(partial(time_prompt, session, random_ids(model, rows, 0), wait)))
    sequences = [session.open() for _ in range(rows)]
    for sequence in sequences:
        session.skip(sequence, batch.length - 1)
    # The first packs what is left, compiles and captures.
    time_decoding(session, sequences, 1, wait)
    step = time_decoding(session, sequences, 2, wait)
    steps = min(max(round(ROUND_SECONDS / step * 1e6), 1), STEPS)
    samples = _rounds(partial(time_decoding, session, sequences, steps, wait))
    return Timing.of(samples, captured=captured_rows(session.plan, rows) is not None)


def prepared_session(
    model: Model,
    plan: Plan,
    tokens: int,
    sequences: int,
    tell: Callable[[Progress], object] = lambda progress: None,
    cache_packed: bool = False,
) -> Session:
    """A session with all weights packed, and kept where they are to be: nothing is written beside what is timed."""
    session = model.session(plan, tokens, sequences, cache_packed=cache_packed)
    for progress in session.prepare(()):
        tell(progress)
    if session.packed_cache is not None:
        session.packed_cache.background.finish()
    return session


def _rounds(sample: Callable[[], float]) -> list[float]:
    """Up to ROUNDS samples, at least one, within LONGEST seconds; one more comes first."""
    sample()
    samples: list[float] = []
    ends = time.perf_counter() + LONGEST
    while len(samples) < ROUNDS and (not samples or time.perf_counter() < ends):
        samples.append(sample())
    return samples


def decode_steps(
    session: Session, sequences: Sequence[CachedSequence], steps: int, sampling: Sampling | None = None
) -> None:
    """Decodes `steps` tokens of every sequence, each the likeliest after the one before or drawn, as a server would."""
    for _ in session.decode(sequences, [0] * len(sequences), steps, sampling):
        pass


def time_prompt(session: Session, ids: Sequence[int], wait: Callable[[], object]) -> float:
    """Microseconds of reading a prompt into an empty sequence, which is closed again."""
    sequence = session.open()
    wait()
    started = time.perf_counter()
    session.feed(sequence, ids)
    wait()
    elapsed = time.perf_counter() - started
    session.close(sequence)
    return elapsed * 1e6


def time_decoding(
    session: Session,
    sequences: Sequence[CachedSequence],
    steps: int,
    wait: Callable[[], object],
    sampling: Sampling | None = None,
) -> float:
    """Microseconds a step, of so many in a row; the sequences are as long afterwards as they were."""
    lengths = [sequence.length for sequence in sequences]
    wait()
    started = time.perf_counter()
    decode_steps(session, sequences, steps, sampling)
    wait()
    elapsed = time.perf_counter() - started
    # What follows overwrites the tokens beyond.
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.length = length
    return elapsed / steps * 1e6


def _time_enqueueing(
    session: Session,
    sequences: Sequence[CachedSequence],
    steps: int,
    wait: Callable[[], object],
    sampling: Sampling,
) -> list[float]:
    """Microseconds that Python and the driver take to enqueue a captured step, from the state of the one before."""
    samples: list[float] = []
    # Reserves room for all steps, starts the drawing, and makes the state of the next.
    with closing(session.decode(sequences, [0] * len(sequences), steps, sampling)) as first:
        next(first)
    way = Way.of([sampling])
    walk = session.captured_step([Feed(sequence, [0]) for sequence in sequences], way)
    assert walk is not None
    ids = session.ids_copy(len(sequences))
    for _ in range((steps - AHEAD) // IN_A_ROW):
        wait()
        started = time.perf_counter()
        for _ in range(IN_A_ROW):
            if way is not None:
                session.drawing.send()
            walk()
            ids.start()
        samples.append((time.perf_counter() - started) / IN_A_ROW * 1e6)
    wait()
    return samples


def random_ids(model: Model, count: int, seed: int) -> list[int]:
    """Token ids at random."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(model.source.shape.vocab, (count,), generator=generator).tolist()
    return ids


def _memory(plan: Plan, load: Load) -> dict[str, int]:
    """Bytes held, by what for; also the most that torch ever held, where it counts."""
    held = {
        "weights": plan.packed_bytes,
        "second copies of weights": plan.extra_copy_bytes,
        "cache": load.tokens * plan.kv_bytes_per_token,
        "activations": max(schedule.layout.nbytes for schedule in plan.schedules.values()),
    }
    if (most := plan.device.platform.peak_bytes(plan.device)) is not None:
        held["most that torch held"] = most
    return held
