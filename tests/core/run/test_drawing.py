"""Drawing a token: the right ones as often as is right; the same ids in a batch, alone, and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fake_backend import CPU
from kernelmux.contract.device import Device, Platform
from kernelmux.errors import KernelmuxError
from kernelmux.run.drawing import Drawing, draw_next
from kernelmux.run.nucleus import Way
from kernelmux.run.sampling import DRAWS, Sampling

LOGITS = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.0, 2.0])
"""Of a vocabulary of six, likeliest first: 1, 2, 5, 0, 4, 3."""


def draw(sampling: Sampling, count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    sampler = sampling.sampler()
    return [draw_next(sampler, logits) for _ in range(count)]


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
    assert draw_next(sampler, LOGITS) == token


def test_a_penalty_counts_for_what_was_drawn_and_makes_what_is_below_0_less():
    sampler = Sampling(repetition_penalty=10.0).sampler()
    assert [draw_next(sampler, torch.tensor([-1.0, -2.0])) for _ in range(3)] == [0, 1, 0]


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
    drawn = set(draw(sampling, 100, logits))
    assert drawn <= set(ids[keep].tolist())
    assert len(drawn) > 1


def test_the_whole_vocabulary_is_sorted_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch):
    sort, sizes = torch.Tensor.sort, []
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, **how: sizes.append(x.numel()) or sort(x, **how))
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 4.0
    for settings in ({}, {"top_p": 0.75}, {"min_p": 0.1, "top_p": 0.9}, {"repetition_penalty": 1.2}):
        draw(Sampling(temperature=1.0, **settings), 3, logits)
    assert not sizes
    for settings in ({"top_k": 2000}, {"top_p": 0.5}):
        draw(Sampling(temperature=1.0, **settings), 3, logits)
    assert max(sizes) == 2000
    draw(Sampling(temperature=1.0, top_p=0.5), 1, logits * 0.01)
    assert sizes[-1] == 20_000


SETTINGS = [
    Sampling(temperature=0.8),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, top_p=0.75, min_p=0.05, repetition_penalty=1.2),
    Sampling(temperature=2.0, top_p=0.4),
    Sampling(temperature=0.7, top_k=50),
    Sampling(temperature=1.5, top_k=2000, top_p=0.95, min_p=0.001, repetition_penalty=1.3),
    Sampling(repetition_penalty=1.5),
    Sampling(),
]


def logits_of(kind: str, count: int = 12, vocab: int = 6000) -> torch.Tensor:
    """[count, vocab]; tied ones take few values, and some of them are the largest of all."""
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(2)) * (0.05 if kind == "flat" else 3.0)
    return logits.round() if kind == "tied" else logits


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device that draws as one that captures does, in host memory."""
    monkeypatch.setattr(Platform, "captures", True)
    return CPU


def drawn_by(device: Device, samplings: Sequence[Sampling], steps: Sequence[torch.Tensor]) -> list[list[int]]:
    """The ids [steps][rows] of a batch that is padded by a row of NaN and one of zeros, by one Drawing."""
    samplers, way = [each.sampler([7, 8]) for each in samplings], Way.of(samplings)
    assert way is not None
    drawing = Drawing(len(samplers) + 2, steps[0].shape[-1], device)
    drawing.rehearse(len(samplers), way)
    drawing.start(samplers)
    padding = torch.tensor([[math.nan], [0.0]]).expand(2, steps[0].shape[-1])
    found = []
    for logits in steps:
        drawing.send()
        ids = drawing.draw(torch.cat([logits.expand(len(samplers), -1), padding]), way).tolist()
        assert all(0 <= token < logits.shape[-1] for token in ids)
        found.append(ids[: len(samplers)])
        drawing.take(found[-1])
    return found


@pytest.mark.parametrize(("kind", "ahead"), [("steep", 1), ("flat", 256), ("tied", 5)])
def test_a_batch_in_a_graph_and_each_row_alone_and_one_token_at_a_time_draw_the_same_ids(
    capturing: Device, monkeypatch: pytest.MonkeyPatch, kind: str, ahead: int
):
    """By settings of each row, of which some are drawn by rejection and some sorted; over borders of numbers ahead."""
    monkeypatch.setattr("kernelmux.run.drawing.NUMBERS_AHEAD", ahead)
    steps = logits_of(kind)
    samplings = [replace(each, seed=seed) for seed, each in enumerate(SETTINGS)]
    batch = drawn_by(capturing, samplings, steps)
    for column, sampling in enumerate(samplings):
        sampler = sampling.sampler([7, 8])
        one_by_one = [draw_next(sampler, logits) for logits in steps]
        assert [ids[column] for ids in batch] == one_by_one
        if not sampling.greedy:
            assert [ids[0] for ids in drawn_by(capturing, [sampling], steps)] == one_by_one


def test_a_batch_is_drawn_on_a_host_as_one_token_at_a_time():
    steps = logits_of("steep", count=4)
    batch = drawn_by(CPU, SETTINGS, steps)
    for column, sampling in enumerate(SETTINGS):
        sampler = sampling.sampler([7, 8])
        assert [ids[column] for ids in batch] == [draw_next(sampler, logits) for logits in steps]


def test_random_numbers_are_those_of_the_seed_however_many_are_made_ahead():
    wanted = torch.rand(600, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    sampler = Sampling(temperature=1.0, seed=9).sampler()
    assert sampler.uniforms(0, 300).equal(wanted[:300])
    for _ in range(5):
        sampler.take(0)
    assert sampler.uniforms(5, 2).equal(wanted[5:7])
    assert sampler.uniforms(250, 300).equal(wanted[250:550])


def test_each_token_has_as_many_numbers_whatever_the_settings():
    """So that what follows does not depend on by which settings others, or those before, were drawn."""
    numbers = []
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0, top_k=5),
    ):
        sampler = sampling.sampler()
        draw_next(sampler, LOGITS)
        numbers.append(sampler.uniforms(1, 4))
    assert numbers[0].equal(numbers[1])
    assert numbers[0].equal(numbers[2])


def test_numbers_are_sent_once_in_so_many_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernelmux.run.drawing.NUMBERS_AHEAD", 4)
    hot = Sampling(temperature=1.0)
    way, drawing, sent = Way.of([hot]), Drawing(1, 6, CPU), []
    monkeypatch.setattr(drawing, "_made_ahead", lambda make=drawing._made_ahead: sent.append(1) or make())
    found = []
    for steps in (4, 9, 2):
        drawing.start([hot.sampler()])
        for _ in range(steps):
            drawing.send()
            found += drawing.draw(LOGITS[None], way).tolist()
        # At the end of a block another graph may be made, which draws once.
        drawing.rehearse(1, Way.of([Sampling(temperature=1.0, top_k=steps)]))
    assert len(sent) == 1 + 3 + 1
    ids = draw(hot, 9)
    assert found == [*ids[:4], *ids, *ids[:2]]


def test_a_drawing_begins_anew_with_each_start():
    """Nothing of the samplers before is left: no settings, tokens seen, or numbers."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    hot, cold = Sampling(temperature=2.0, repetition_penalty=5.0, seed=1), Sampling(repetition_penalty=2.0)
    drawing, found = Drawing(2, 50, CPU), []
    for sampling in (hot, cold, hot):
        way = Way.of([sampling])
        drawing.start([sampling.sampler()])
        found.append([])
        for _ in range(20):
            drawing.send()
            found[-1] += drawing.draw(logits, way).tolist()
    assert found[0] == found[2]
    alone = cold.sampler()
    assert found[1] == [draw_next(alone, logits[0]) for _ in range(20)]
