"""The algorithms: held to their definitions in float64 and to the softmax's frequencies, in a graph and on a host."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernelmux.run.nucleus import CANDIDATES, Rows, Way, draw_in_graph, draw_on_host
from kernelmux.run.sampling import DRAWS, Sampling

REJECTION = {
    "temperature": Sampling(temperature=0.8),
    "top_p": Sampling(temperature=1.0, top_p=0.9),
    "least top_p": Sampling(temperature=1.2, top_p=0.75),
    "top_p that hardly cuts": Sampling(temperature=1.0, top_p=0.9999),
    "min_p": Sampling(temperature=1.0, min_p=0.05),
    "min_p that cuts what top_p keeps": Sampling(temperature=1.5, top_p=0.9, min_p=0.5),
    "min_p that hardly cuts": Sampling(temperature=3.0, top_p=0.8, min_p=1e-12),
    "cold": Sampling(top_p=0.5, top_k=3, min_p=0.1),
}
SORTED = {
    "small top_p": Sampling(temperature=1.0, top_p=0.5),
    "tiny top_p": Sampling(temperature=3.0, top_p=1e-9),
    "top_k": Sampling(temperature=0.7, top_k=50),
    "top_k of more than there are": Sampling(temperature=0.7, top_k=10**9),
    "top_k beyond the candidates": Sampling(temperature=2.0, top_k=CANDIDATES + 500),
    "min_p too": Sampling(temperature=2.0, top_p=0.6, min_p=0.01),
    "all": Sampling(temperature=1.5, top_k=2000, top_p=0.95, min_p=0.001),
}
SETTINGS = [*REJECTION.values(), *SORTED.values()]
KINDS = ("steep", "flat", "tied")


def logits_of(kind: str, count: int = 5, vocab: int = 6000) -> torch.Tensor:
    """[count, vocab]; tied ones take few values, and some of them are the largest of all."""
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(2)) * (0.05 if kind == "flat" else 3.0)
    return logits.round() if kind == "tied" else logits


def uniforms_of(samplings: list[Sampling], seed: int = 0) -> torch.Tensor:
    """[rows, DRAWS]: as `Sampler.uniforms` gives them, 0 where the likeliest is taken."""
    warm = torch.tensor([[float(each.temperature > 0)] for each in samplings], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(samplings), DRAWS, dtype=torch.float64, generator=generator) * warm


def drawn(samplings: list[Sampling], logits: torch.Tensor, uniforms: torch.Tensor, in_graph: bool) -> list[int]:
    """The ids of a batch, which takes the way of its settings."""
    way = Way.of(samplings)
    assert way is not None
    rows = Rows.of(samplings, logits.shape[1]).used(way)
    ids = draw_in_graph(logits, rows, uniforms, way) if in_graph else draw_on_host(logits, rows, uniforms)
    assert ids.shape == (len(samplings), 1)
    found: list[int] = ids[:, 0].tolist()
    return found


def by_definition(logits: np.ndarray, sampling: Sampling, uniforms: np.ndarray) -> int:
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    if sampling in SORTED.values():
        return _sorted(weights, sampling, float(uniforms[0]))
    sums = np.cumsum(np.where(weights >= sampling.min_p, weights, 0))
    candidates = np.searchsorted(sums, uniforms * sums[-1], side="right")
    for token in candidates:
        if weights[logits > logits[token]].sum() < sampling.top_p * weights.sum():
            return int(token)
    return int(candidates[np.argmax(logits[candidates])])


def _sorted(weights: np.ndarray, sampling: Sampling, uniform: float) -> int:
    order = np.argsort(-weights, kind="stable")[: sampling.top_k or None]
    weights = weights[order]
    before_it = np.cumsum(weights) - weights
    order = order[(before_it < sampling.top_p * weights.sum() * (1 - 1e-15)) & (weights >= sampling.min_p)]
    weights = weights[: len(order)]
    return int(order[np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right")])


@pytest.mark.parametrize("in_graph", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [512, 6000])
def test_ids_are_those_of_the_definition_in_float64(kind: str, vocab: int, in_graph: bool):
    """Of each row alone, and of a batch of all settings: who else is in it changes nothing."""
    for seed, logits in enumerate(logits_of(kind, vocab=vocab)):
        batch, uniforms = logits.expand(len(SETTINGS), -1), uniforms_of(SETTINGS, seed)
        pairs = zip(SETTINGS, uniforms.numpy(), strict=True)
        wanted = [by_definition(logits.double().numpy(), each, numbers) for each, numbers in pairs]
        assert drawn(SETTINGS, batch, uniforms, in_graph) == wanted
        for index, sampling in enumerate(SETTINGS):
            row = slice(index, index + 1)
            if not sampling.greedy:
                assert drawn([sampling], batch[row], uniforms[row], in_graph) == wanted[row]


def test_which_way_is_taken_says_what_some_row_needs():
    ways = [Way.of([each]) for each in REJECTION.values() if not each.greedy]
    assert all(way and way.rejection and not way.sorting for way in ways)
    assert all(way and way.sorting and not way.rejection for way in map(Way.of, [[each] for each in SORTED.values()]))
    assert Way.of([Sampling(), Sampling(top_k=5)]) is None
    hot, penalised = Sampling(temperature=1.0), Sampling(repetition_penalty=1.1)
    assert Way.of([hot]) == Way.of([hot, Sampling(top_p=0.1)]) == Way(True, False, False, False, False)
    assert Way.of([penalised]) == Way(True, False, False, False, True)
    assert Way.of([hot, replace(hot, top_k=2, top_p=0.5), replace(hot, min_p=0.1)]) == Way(
        True, True, True, True, False
    )


@pytest.mark.parametrize("in_graph", [True, False])
def test_rows_of_nan_get_some_token_and_spoil_no_other(in_graph: bool):
    logits = logits_of("steep", count=1, vocab=300).expand(len(SETTINGS), -1)
    uniforms = uniforms_of(SETTINGS)
    for spoiled in (0, 1):
        samplings = SETTINGS[spoiled::2]
        few, numbers = logits[spoiled::2], uniforms[spoiled::2]
        whole = drawn(samplings, few, numbers, in_graph)
        broken = few.clone()
        broken[::3] = math.nan
        found = drawn(samplings, broken, numbers, in_graph)
        assert all(0 <= token < 300 for token in found)
        assert [found[row] for row in range(len(found)) if row % 3] == [
            whole[row] for row in range(len(found)) if row % 3
        ]


@pytest.mark.parametrize("in_graph", [True, False])
@pytest.mark.parametrize("kind", ["steep", "tied"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.3),
        Sampling(temperature=0.9, top_p=0.95),
        Sampling(temperature=1.2, top_p=0.75),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=1.0, top_p=0.95, min_p=0.02),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=1.0, top_k=30, min_p=0.02),
    ],
    ids=lambda sampling: " ".join(f"{name} {value}" for name, value in vars(sampling).items() if value not in (0, 1)),
)
def test_what_is_drawn_has_the_softmaxs_frequencies(sampling: Sampling, kind: str, in_graph: bool):
    """Pearson's chi-square over the tokens that are kept: beyond what one fixed seed in a thousand gives."""
    vocab, rows = 40, 5000
    logits = logits_of(kind, count=1, vocab=vocab) / 3 * 1.2
    samplings = [sampling] * rows
    ids = drawn(samplings, logits.expand(rows, -1), uniforms_of(samplings, 3), in_graph)
    found = np.bincount(ids, minlength=vocab)
    weights = (logits[0].double() / sampling.temperature).softmax(dim=0).numpy()
    order = np.argsort(-weights, kind="stable")[: sampling.top_k or None]
    # Drawn by rejection, those that tie with one are not before it.
    before = np.cumsum(weights[order]) - weights[order]
    if not sampling.top_k and sampling.top_p >= 0.75:
        before = np.array([weights[weights > weight * (1 + 1e-12)].sum() for weight in weights[order]])
    kept = order[(before < sampling.top_p * weights[order].sum()) & (weights[order] >= sampling.min_p * weights.max())]
    assert found.sum() == found[kept].sum() == rows
    expected = weights[kept] / weights[kept].sum() * rows
    assert expected.min() > 5
    freedom = len(kept) - 1
    # Wilson and Hilferty's approximation of the quantile, 3.09 deviations.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((found[kept] - expected) ** 2 / expected).sum() < bound


@pytest.mark.parametrize("in_graph", [True, False])
@pytest.mark.parametrize(("top_p", "kept"), [(0.75, {0, 1, 2, 3}), (0.7, {0, 1, 2})], ids=["rejection", "sorted"])
def test_of_ties_at_the_border_rejection_keeps_all_and_sorting_the_lower_ids(
    top_p: float, kept: set[int], in_graph: bool
):
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    samplings = [Sampling(temperature=1.0, top_p=top_p)] * 200
    assert set(drawn(samplings, logits.expand(200, -1), uniforms_of(samplings), in_graph)) == kept


@pytest.mark.parametrize("in_graph", [True, False])
def test_where_no_candidate_is_kept_the_likeliest_of_them_is_drawn(in_graph: bool):
    """The first token has 0.8 of all, and is no candidate; all others are outside of the nucleus."""
    logits = torch.tensor([[0.8, 0.02, 0.07, 0.07, 0.04]]).log()
    samplings = [Sampling(temperature=1.0, top_p=0.75)]
    uniforms = torch.full((1, DRAWS), 0.81, dtype=torch.float64)
    assert drawn(samplings, logits, uniforms, in_graph) == [1]
    uniforms[:, 4:] = torch.tensor([0.99, 0.93, 0.85, *[0.97] * 9])
    assert drawn(samplings, logits, uniforms, in_graph) == [3]
    uniforms[:, 9] = 0.5
    assert drawn(samplings, logits, uniforms, in_graph) == [0]


@pytest.mark.parametrize("in_graph", [True, False])
def test_a_number_next_to_1_draws_the_last_token_that_is_kept(in_graph: bool):
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0, -math.inf]])
    uniforms = torch.full((1, DRAWS), 1 - 2**-53, dtype=torch.float64)
    assert drawn([Sampling(temperature=1.0)], logits, uniforms, in_graph)[0] in (3, 4)
    assert drawn([Sampling(temperature=1.0, top_k=2)], logits, uniforms, in_graph) == [1]
    assert drawn([Sampling(temperature=1.0, min_p=0.1)], logits, uniforms, in_graph)[0] in (2, 3, 4)


@pytest.mark.parametrize("in_graph", [True, False])
def test_cold_rows_get_the_first_of_the_likeliest_however_near_others_are(in_graph: bool):
    """Beside a hot row, so that each is drawn."""
    rows = torch.tensor(
        [
            [0.0, 1.0, 1.0, 1.0 - 2**-24],
            [-1e-45, 0.0, 0.0, -1e-45],
            [-3e38, 3e38, 3e38, 2.9999e38],
            [-math.inf, -9, -9, -9],
        ]
    )
    samplings = [Sampling(temperature=1.0, top_p=0.9), *[Sampling()] * len(rows)]
    logits = torch.cat([torch.zeros(1, 4), rows])
    assert drawn(samplings, logits, uniforms_of(samplings), in_graph)[1:] == [1] * len(rows)


@pytest.mark.parametrize("at_once", [1, 300 * 8 * 3, 2**25])
def test_candidates_that_are_weighed_few_at_a_time_give_the_same_ids(monkeypatch: pytest.MonkeyPatch, at_once: int):
    samplings = [Sampling(temperature=2.0, top_p=top_p) for top_p in (0.75, 0.8, 0.9)]
    logits, uniforms = logits_of("steep", count=3, vocab=300), uniforms_of(samplings)
    wanted = drawn(samplings, logits, uniforms, in_graph=False)
    monkeypatch.setattr("kernelmux.run.nucleus.AT_ONCE", at_once)
    assert drawn(samplings, logits, uniforms, in_graph=True) == wanted
