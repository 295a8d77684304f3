"""Sessions: however tokens are dealt into steps, batches and pages, logits are the same; and drawing from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernelmux
from kernelmux.errors import KernelmuxError
from kernelmux.graph.graph import PAGE_SIZE
from kernelmux.plan.plan import Plan
from kernelmux.run.generate import generate
from kernelmux.run.model import Model
from kernelmux.run.sampling import Sampling
from kernelmux.run.session import CapacityError, Feed

ATOL = 1e-4
KERNELS = {"torch": "*=torch:f32,torch:sdpa,torch:rows", "reference": "*=reference:f32"}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.fixture(scope="module", params=KERNELS.values(), ids=KERNELS)
def use(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plan(model: Model, use: str) -> Plan:
    return model.plan(use=[use])


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids below 256: no control tokens."""
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same(found: torch.Tensor, wanted: torch.Tensor):
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE + 7])
def test_a_prompt_in_chunks_gives_the_logits_of_one_go(model: Model, use: str, plan: Plan, rows: int):
    ids = prompt(2 * PAGE_SIZE + 8)
    chunked = model.plan(use=[use], max_rows=rows)
    assert_same(model.forward(ids, chunked), model.forward(ids, plan))


def test_a_prompt_token_by_token_gives_the_logits_of_one_go(model: Model, plan: Plan):
    ids = prompt(2 * PAGE_SIZE + 8)
    session = model.session(plan, len(ids))
    sequence = session.open()
    rows = [session.step([Feed(sequence, [token])]).clone() for token in ids]
    assert_same(torch.cat(rows), model.forward(ids, plan))


def test_a_step_gives_the_last_rows_logits_or_all_rows_as_each_feed_asks(model: Model, plan: Plan):
    first, second, third = prompt(5, 1), prompt(18, 2), prompt(3, 3)
    session = model.session(plan, 40, sequences=3)
    logits = session.step(
        [Feed(session.open(), first), Feed(session.open(), second, all_logits=True), Feed(session.open(), third)]
    )
    alone = [model.forward(ids, plan) for ids in (first, second, third)]
    assert_same(logits, torch.cat([alone[0][-1:], alone[1], alone[2][-1:]]))


def test_sequences_in_one_batch_give_the_logits_of_each_alone(model: Model, plan: Plan):
    """Prefill and decode in the same steps; a sequence joins late and skips a step."""
    page = PAGE_SIZE
    texts = [prompt(2 * page + 4, 1), prompt(7, 2), prompt(page + 4, 3)]
    # By step: how many tokens each sequence is fed.
    steps = [(0, 4, 0), (page + 4, 1, 0), (page - 1, 1, page + 1), (0, 0, 2), (1, 1, 1)]
    session = model.session(plan, sum(map(len, texts)), sequences=3)
    sequences = [session.open() for _ in texts]
    alone = [model.forward(ids, plan) for ids in texts]
    for counts in steps:
        feeds, expected = [], []
        for sequence, ids, count, logits in zip(sequences, texts, counts, alone, strict=True):
            if count:
                end = sequence.length + count
                feeds.append(Feed(sequence, ids[sequence.length : end]))
                expected.append(logits[end - 1])
        assert_same(session.step(feeds), torch.stack(expected))
    assert [sequence.length for sequence in sequences] == [2 * page + 4, 7, page + 4]


def test_sequences_whose_pages_interleave_give_the_logits_of_each_alone(model: Model, plan: Plan):
    texts = [prompt(3 * PAGE_SIZE, seed) for seed in (1, 2)]
    session = model.session(plan, 6 * PAGE_SIZE, sequences=2)
    sequences = [session.open() for _ in texts]
    found: list[list[torch.Tensor]] = [[], []]
    for start in range(0, 3 * PAGE_SIZE, PAGE_SIZE):
        for index, (sequence, ids) in enumerate(zip(sequences, texts, strict=True)):
            found[index].append(session.feed(sequence, ids[start : start + PAGE_SIZE], all_logits=True))
    assert [sequence.pages for sequence in sequences] == [[0, 2, 4], [1, 3, 5]]
    for rows, ids in zip(found, texts, strict=True):
        assert_same(torch.cat(rows), model.forward(ids, plan))


def test_a_closed_sequences_pages_are_used_again_and_leak_nothing(model: Model, plan: Plan):
    """The cache holds one sequence at a time: the second one would not fit beside the first."""
    session = model.session(plan, 2 * PAGE_SIZE)
    first = session.open()
    session.feed(first, prompt(2 * PAGE_SIZE, 1))
    with pytest.raises(CapacityError):
        session.feed(session.open(), [1])
    session.close(first)
    for length in (PAGE_SIZE + 1, 2 * PAGE_SIZE):
        sequence, ids = session.open(), prompt(length, length)
        assert_same(session.feed(sequence, ids, all_logits=True), model.forward(ids, plan))
        session.close(sequence)


def test_a_closed_sequence_may_be_closed_again_and_is_not_fed_again(model: Model, plan: Plan):
    """Its pages are given back once: no two sequences ever share one."""
    session = model.session(plan, 2 * PAGE_SIZE)
    first, ids = session.open(), prompt(2 * PAGE_SIZE)
    session.feed(first, prompt(20, 1))
    session.close(first)
    session.close(first)
    for feed in (lambda: session.feed(first, ids), lambda: next(session.decode([first], [1], 2))):
        with pytest.raises(CapacityError, match=r"the sequence is closed: session\.open\(\)"):
            feed()
    assert_same(session.feed(session.open(), ids, all_logits=True), model.forward(ids, plan))
    with pytest.raises(CapacityError):
        session.feed(session.open(), [1])


def test_a_sequence_of_another_session_is_refused_and_neither_cache_changes(model: Model, plan: Plan):
    ids = prompt(20)
    mine, other = (model.session(plan, 2 * PAGE_SIZE) for _ in range(2))
    theirs = other.open()
    other.feed(theirs, ids[:10])
    calls = {
        "feed": lambda: mine.feed(theirs, [1]),
        "step": lambda: mine.step([Feed(theirs, [1])]),
        "decode": lambda: next(mine.decode([theirs], [1], 2)),
        "close": lambda: mine.close(theirs),
    }
    for call in calls.values():
        with pytest.raises(CapacityError, match="another session's"):
            call()
    assert_same(other.feed(theirs, ids[10:], all_logits=True), model.forward(ids, plan)[10:])
    # All of the session's own pages are free, and once.
    mine.feed(mine.open(), prompt(2 * PAGE_SIZE))
    with pytest.raises(CapacityError, match="free"):
        mine.feed(mine.open(), [1])


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 1), (16, 0), (-1, 1)])
def test_a_session_of_nothing_is_refused(model: Model, plan: Plan, tokens: int, sequences: int):
    with pytest.raises(CapacityError, match=f"not tokens={tokens} and sequences={sequences}"):
        model.session(plan, tokens, sequences)


def test_decode_takes_a_token_for_each_sequence(model: Model, plan: Plan):
    session = model.session(plan, 64, sequences=2)
    sequences = [session.open(), session.open()]
    with pytest.raises(CapacityError, match="2 sequences, 1 tokens"):
        next(session.decode(sequences, [1], 2))
    assert len(next(session.decode(sequences, [1, 2], 2))) == 2


def test_closing_one_sequence_leaves_the_others_as_they_were(model: Model, plan: Plan):
    ids = prompt(30, 1)
    session = model.session(plan, 64, sequences=2)
    kept, closed = session.open(), session.open()
    session.step([Feed(kept, ids[:20]), Feed(closed, prompt(20, 2))])
    session.close(closed)
    session.feed(session.open(), prompt(20, 3))
    assert_same(session.feed(kept, ids[20:], all_logits=True), model.forward(ids, plan)[20:])


REFUSED = {
    "too many tokens": [2 * PAGE_SIZE + 1],
    "too many tokens together": [PAGE_SIZE + 1, PAGE_SIZE + 1],
    "too many sequences": [1, 1, 1, 1],
    "too many rows": [3 * PAGE_SIZE],
    "no sequence": [],
    "a sequence without tokens": [1, 0],
}


@pytest.mark.parametrize("lengths", REFUSED.values(), ids=REFUSED)
def test_a_step_that_does_not_fit_changes_nothing(model: Model, use: str, lengths: list[int]):
    ids, fed = prompt(PAGE_SIZE + 8, 1), PAGE_SIZE + 4  # two pages
    plan = model.plan(use=[use], max_rows=3 * PAGE_SIZE - 1)
    session = model.session(plan, 2 * PAGE_SIZE, sequences=3)  # four pages
    sequence = session.open()
    session.feed(sequence, ids[:fed])
    feeds = [Feed(session.open(), prompt(length)) for length in lengths]
    with pytest.raises(CapacityError):
        session.step(feeds)
    assert all(feed.sequence.length == 0 and not feed.sequence.pages for feed in feeds)
    expected = model.forward(ids, plan)
    assert_same(session.feed(sequence, ids[fed:], all_logits=True), expected[fed:])
    # What was free before is free still.
    session.feed(session.open(), prompt(2 * PAGE_SIZE))


def test_a_prompt_that_outgrows_the_cache_midway_can_be_closed(model: Model, use: str):
    plan = model.plan(use=[use], max_rows=PAGE_SIZE)
    session = model.session(plan, 2 * PAGE_SIZE)
    sequence = session.open()
    with pytest.raises(CapacityError, match="free"):
        session.feed(sequence, prompt(2 * PAGE_SIZE + 8))
    session.close(sequence)
    ids = prompt(2 * PAGE_SIZE, 1)
    assert_same(session.feed(session.open(), ids, all_logits=True), model.forward(ids, plan))


def test_feeding_no_tokens_is_a_capacity_error(model: Model, plan: Plan):
    session = model.session(plan, 16)
    with pytest.raises(CapacityError, match="at least one token"):
        session.feed(session.open(), [])


def test_one_sequence_twice_in_a_step_is_refused(model: Model, plan: Plan):
    """Its tokens would overwrite each other in the cache."""
    session = model.session(plan, 32, sequences=2)
    sequence = session.open()
    with pytest.raises(KernelmuxError):
        session.step([Feed(sequence, [1, 2]), Feed(sequence, [3])])


def greedy(model: Model, plan: Plan, end_ids: Sequence[int] = (), max_tokens: int = 12) -> list[int]:
    session = model.session(plan, 40)
    return list(generate(session, prompt(8, 5), Sampling(), frozenset(end_ids), max_tokens))


@pytest.mark.parametrize("count", [1, 2, 12])
def test_generation_stops_at_max_tokens(model: Model, plan: Plan, count: int):
    assert len(greedy(model, plan, max_tokens=count)) == count


def test_generation_stops_at_the_end_token_and_yields_it(model: Model, plan: Plan):
    free = greedy(model, plan)
    end = free[1]
    assert greedy(model, plan, [end]) == free[: free.index(end) + 1]
    assert greedy(model, plan, [free[0]]) == free[:1]


def test_greedy_generation_takes_the_likeliest_token_of_each_step(model: Model, plan: Plan):
    ids = prompt(8, 5)
    found = greedy(model, plan)
    logits = model.forward([*ids, *found[:-1]], plan)
    assert found == logits[len(ids) - 1 :].argmax(dim=1).tolist()


def test_an_abandoned_generation_gives_its_pages_back(model: Model, plan: Plan):
    session = model.session(plan, 2 * PAGE_SIZE)
    tokens = generate(session, prompt(20), Sampling(), frozenset(), 10)
    next(tokens)
    tokens.close()
    session.feed(session.open(), prompt(2 * PAGE_SIZE))


LOGITS = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.0, 2.0])
"""Of a vocabulary of six, likeliest first: 1, 2, 5, 0, 4, 3."""


def draw(sampling: Sampling, count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    sampler = sampling.sampler()
    return [sampler(logits) for _ in range(count)]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    hot = [draw(Sampling(temperature=1.5, seed=seed), 64) for seed in (7, 7, 8)]
    assert hot[0] == hot[1] != hot[2]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0, top_p=0.5, top_k=3),
        Sampling(temperature=1.5, top_k=1),
        Sampling(temperature=1.5, top_p=1e-9),
        Sampling(temperature=1e-6),
        Sampling(temperature=1e-310),
    ],
    ids=["default", "cold", "top_k=1", "tiny top_p", "nearly cold", "colder than logits / temperature can say"],
)
def test_the_likeliest_token_is_drawn_where_settings_leave_no_other(sampling: Sampling):
    assert set(draw(sampling, 50)) == {1}


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=2.5), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=3), [1, 2, 5]),
        (Sampling(temperature=1.0, top_k=50), [0, 1, 2, 3, 4, 5]),
        # The likeliest two have 0.74 together, three have 0.91.
        (Sampling(temperature=1.0, top_p=0.7), [1, 2]),
        (Sampling(temperature=1.0, top_p=0.8), [1, 2, 5]),
        # Of the likeliest three, two have 0.81.
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), [1, 2]),
        # The second has 0.61 of the likeliest's, the third 0.37.
        (Sampling(temperature=1.0, min_p=0.5), [1, 2]),
        (Sampling(temperature=1.0, min_p=0.3, top_p=0.7), [1, 2]),
    ],
)
def test_tokens_are_drawn_as_often_as_the_softmax_of_those_kept_says(sampling: Sampling, kept: list[int]):
    count = 4000
    found = torch.bincount(torch.tensor(draw(sampling, count)), minlength=len(LOGITS)) / count
    wanted = torch.zeros(len(LOGITS))
    wanted[kept] = (LOGITS[kept] / sampling.temperature).softmax(dim=0)
    four_deviations = 4 * (wanted * (1 - wanted) / count).sqrt()
    assert ((found - wanted).abs() <= four_deviations).all(), found


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": 2**64},
    ],
    ids=lambda settings: " ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, float]):
    with pytest.raises(KernelmuxError, match=next(iter(settings))):
        Sampling(**{"temperature": 1.0, **settings}).sampler()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=1)], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("before", "penalty", "token"), [([], 2.0, 1), ([1], 2.0, 2), ([1, 2], 2.0, 5), ([1], 1.0, 1)])
def test_tokens_that_were_there_are_less_likely(sampling: Sampling, before: list[int], penalty: float, token: int):
    sampler = replace(sampling, repetition_penalty=penalty).sampler(before)
    assert sampler(LOGITS) == token


def test_a_penalty_counts_for_what_was_drawn_and_makes_what_is_below_0_less():
    sampler = Sampling(repetition_penalty=10.0).sampler()
    assert [sampler(torch.tensor([-1.0, -2.0])) for _ in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("flat", [False, True], ids=["a few reach top_p", "it takes thousands"])
@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 50}, {"top_p": 0.5, "min_p": 0.01}])
def test_of_a_large_vocabulary_the_same_are_kept_as_by_sorting_all(settings: dict[str, float], flat: bool):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20_000, generator=generator) * (0.1 if flat else 4.0)
    sampling = Sampling(temperature=1.0, **settings)
    probabilities, ids = logits.double().softmax(dim=0).sort(descending=True)
    if sampling.top_k:
        probabilities, ids = probabilities[: sampling.top_k], ids[: sampling.top_k]
    before = probabilities.cumsum(dim=0) - probabilities
    keep = (before < sampling.top_p * probabilities.sum()) & (probabilities >= sampling.min_p * probabilities[0])
    drawn = set(draw(sampling, 300, logits))
    assert drawn <= set(ids[keep].tolist())
    assert len(drawn) > 1


def test_the_whole_vocabulary_is_sorted_only_where_it_must_be(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sort", lambda *_, **__: pytest.fail("it was sorted"))
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 4.0
    for settings in ({}, {"top_k": 2000}, {"top_p": 0.9}, {"min_p": 0.1}):
        draw(Sampling(temperature=1.0, **settings), 1, logits)


def test_generation_with_a_seed_is_reproducible(model: Model, plan: Plan):
    def run(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return list(generate(model.session(plan, 40), prompt(8, 5), sampling, frozenset(), 12))

    assert run(3) == run(3) != run(4)
