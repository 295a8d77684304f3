"""Captured decode steps: the bytes of eager ones, ids of a step at a time, drawn too; no growth; who breaks one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernelmux
import tiny_model
from fake_backend import FakeKernel, compute
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.device import find_device
from kernelmux.errors import LaunchError, LogitsError
from kernelmux.graph.formats import as_tuple
from kernelmux.policy.policy import parse_policy
from kernelmux.run.drawing import Drawing, draw_next
from kernelmux.run.ladder import captured_extents
from kernelmux.run.model import Model
from kernelmux.run.nucleus import Way
from kernelmux.run.sampling import Sampling
from kernelmux.run.session import Feed, Session

POLICIES = {"f32": "*=triton:f32,torch:f32,triton,torch", "bf16": "mul_mat=torch:bf16"}
PROMPTS = [[1, 2, 3, 4, 5], [9] * 17, [100, 30], [7, 8, 9] * 10, [50]]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.fixture(scope="module", params=POLICIES.values(), ids=POLICIES)
def plan(model: Model, request: pytest.FixtureRequest):
    return model.plan(use=[request.param], device="cuda")


def _opened(session: Session, prompts: list[list[int]]):
    sequences = [session.open() for _ in prompts]
    firsts = [int(session.feed(s, ids)[-1].argmax()) for s, ids in zip(sequences, prompts, strict=True)]
    return sequences, firsts


def _bytes(walk) -> dict[str, list[torch.Tensor]]:
    torch.cuda.synchronize()
    return {name: [part.clone() for part in as_tuple(planes)] for name, planes in walk.outputs.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_captured_step_gives_the_bytes_of_an_eager_one_at_the_same_rows(model: Model, plan, count):
    session = model.session(plan, 400, sequences=8)
    sequences, firsts = _opened(session, PROMPTS[:count])
    captured = session.step([Feed(s, [t]) for s, t in zip(sequences, firsts, strict=True)]).clone()
    for sequence in sequences:
        sequence.length -= 1
    rows = 1 << (count - 1).bit_length()
    assert session.walker.made.captured
    # The same state again, padding included, each launch made from Python.
    with session._on_stream():
        session._write_state([Feed(s, [t]) for s, t in zip(sequences, firsts, strict=True)], captured_extents(rows))
        walk = session.walker.bind(m=rows, outs=rows, seqs=rows)
        walk()
    (eager,) = _bytes(walk)["logits"]
    assert torch.equal(captured, eager[:count])


def test_decoding_on_the_device_gives_the_ids_of_a_step_at_a_time(model: Model, plan):
    both = []
    for on_device in (True, False):
        session = model.session(plan, 400, sequences=5)
        sequences, ids = _opened(session, PROMPTS)
        if on_device:
            both.append(list(session.decode(sequences, ids, 24)))
            continue
        columns = []
        for _ in range(24):
            ids = session.step([Feed(s, [t]) for s, t in zip(sequences, ids, strict=True)]).argmax(-1).tolist()
            columns.append(ids)
        both.append(columns)
    assert both[0] == both[1]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_p=0.9)], ids=["greedy", "drawn"])
def test_a_thousand_steps_hold_no_more_memory_than_one(model: Model, plan, sampling: Sampling | None):
    session = model.session(plan, 1100)
    sequences, ids = _opened(session, PROMPTS[:1])
    held = []
    for index, (token,) in enumerate(session.decode(sequences, ids, 1000, sampling)):
        assert token >= 0
        if index in (10, 999):
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[0] == held[1]


class _Synchronizing(FakeKernel):
    """Claims to be capturable, and waits for the device."""

    def __init__(self):
        super().__init__("waits", work=self._work)

    def _work(self, node, tensors):
        compute(node, tensors)
        torch.cuda.synchronize()


class _Eager(FakeKernel):
    capturable = False


def _model_with(kernel, tiny: Path, name: str):
    installed = {name: __import__(f"kernelmux_{name}") for name in ("torch", "triton")}
    return registry.isolated(**installed, **{name: backend(silu=kernel)})


def test_the_node_that_breaks_a_capture_is_named(tiny: Path):
    with _model_with(_Synchronizing(), tiny, "slow"):
        model = kernelmux.load(tiny)
        session = model.session(model.plan(use=[POLICIES["f32"], "silu=slow"], device="cuda"), 100)
        sequences, ids = _opened(session, PROMPTS[:1])
        with pytest.raises(LaunchError, match=r"captured.*slow:waits raised at blk.0.ffn_silu"):
            session.step([Feed(sequences[0], ids)])
    torch.cuda.synchronize()


def test_a_kernel_that_cannot_be_captured_makes_its_bucket_eager_and_the_plan_says_so(tiny: Path):
    from kernelmux.cli.plan import capturing

    with _model_with(_Eager("eager", work=compute), tiny, "slow"):
        model = kernelmux.load(tiny)
        plan = model.plan(use=[POLICIES["f32"], "silu=slow"], device="cuda")
        session = model.session(plan, 100)
        sequences, ids = _opened(session, PROMPTS[:1])
        assert len(list(session.decode(sequences, ids, 3))) == 3
        assert session.walker.made.captured == 0
        assert any("slow:eager of blk.0.ffn_silu" in line for line in capturing(plan))


class _RaisesAt(FakeKernel):
    """Spoils what it writes and raises, at its n-th launch from Python: in a walk, before a capture, or within one."""

    def __init__(self, nth):
        super().__init__("flaky", work=self._work)
        self.nth, self.count = nth, 0

    def _work(self, node, tensors):
        self.count += 1
        compute(node, tensors)
        if self.count == self.nth:
            tensors.outputs[0].fill_(float("nan"))
            raise RuntimeError("out of tiles")


FALLS_BACK = """fuse = false
[[rule]]
op = "silu"
use = "slow"
on_error = "next"

[defaults]
use = ["triton:f32", "torch:f32", "triton", "torch"]
"""


def _decoded_as_more_join(kernel, tiny: Path):
    """The ids of sequences that join one after another, each time decoded in a captured step of other rows."""
    with _model_with(kernel, tiny, "slow"):
        model = kernelmux.load(tiny)
        session = model.session(model.plan(parse_policy(FALLS_BACK, "p.toml"), device="cuda"), 800, sequences=4)
        stream, sequences, last, found = session.walker.stream, [], [], []
        for prompt in PROMPTS[:3]:
            (sequence,), (first,) = _opened(session, [prompt])
            sequences, last = [*sequences, sequence], [*last, first]
            for ids in session.decode(sequences, last, 8):
                found.append(ids)
                last = ids
    assert session.walker.stream is stream
    return found, session


# Two layers: two launches in each prompt's walk, and four for each captured size, of which two are recorded.
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6, 8, 9, 11, 12])
def test_a_kernel_that_raises_between_captured_steps_costs_no_token(tiny: Path, nth: int):
    wanted, _ = _decoded_as_more_join(_RaisesAt(0), tiny)
    kernel = _RaisesAt(nth)
    found, session = _decoded_as_more_join(kernel, tiny)
    assert kernel.count >= nth
    assert len(session.walker.plan.banned) == 1
    assert session.walker.made.captured
    assert found == wanted


# Drawn tokens.

DRAWN = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=2),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=2.0, top_k=50, min_p=0.01, seed=4),
    Sampling(),
    Sampling(temperature=1.0, top_p=0.5, seed=6),
]
"""By rejection but for two, which are sorted."""


@pytest.mark.parametrize("chosen", [DRAWN[:1], DRAWN[:2], DRAWN[:3], DRAWN[3:4], DRAWN[1:6], DRAWN[5:6]], ids=len)
def test_drawing_in_the_captured_step_gives_the_ids_of_a_step_at_a_time(model: Model, plan, chosen: list[Sampling]):
    """Settings of each sequence, padding rows beside them; the same numbers made ahead and one by one."""
    both, count = [], len(chosen)
    for on_device in (True, False):
        session = model.session(plan, 1600, sequences=count)
        samplers = [each.sampler(ids) for each, ids in zip(chosen, PROMPTS[:count], strict=True)]
        sequences, ids = _opened(session, PROMPTS[:count])
        if on_device:
            both.append(list(session.decode(sequences, ids, 280, samplers)))
            assert session.walker.made.captured
            continue
        columns = []
        for _ in range(280):
            logits = session.step([Feed(s, [t]) for s, t in zip(sequences, ids, strict=True)])
            ids = [draw_next(sampler, row) for sampler, row in zip(samplers, logits, strict=True)]
            columns.append(ids)
        both.append(columns)
    assert both[0] == both[1]


LARGE = {
    "top_p": [Sampling(temperature=1.0, top_p=0.95)],
    "min_p": [Sampling(temperature=1.5, top_p=0.8, min_p=0.01)],
    "small top_p": [Sampling(temperature=1.0, top_p=0.4)],
    "mixed": [Sampling(temperature=1.0, top_p=0.9), Sampling(temperature=0.7), Sampling(temperature=1.5, top_k=40)],
    "few candidates at a time": [Sampling(temperature=1.0, top_p=0.75, seed=seed) for seed in range(20)],
}


@pytest.mark.parametrize("vocab", [128_256, 151_667])
@pytest.mark.parametrize("settings", LARGE.values(), ids=LARGE)
def test_a_large_vocabulary_is_drawn_on_the_card_as_on_the_host(settings: list[Sampling], vocab: int):
    """Of logits of which many are tied, in a graph there and row by row here; one vocabulary is padded."""
    rows, way, device = len(settings), Way.of(settings), find_device("cuda")
    logits = (torch.randn(8, rows, vocab, generator=torch.Generator().manual_seed(5)) * 3).mul_(64).round_().div_(64)
    samplers = [each.sampler() for each in settings]
    drawing, source = Drawing(rows, vocab, device), logits[0].to("cuda")
    drawing.rehearse(rows, way)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with device.platform.capturing(graph, stream):
        ids = drawing.draw(source, way)
    drawing.start(samplers)
    found = []
    for step in logits:
        source.copy_(step)
        drawing.send()
        graph.replay()
        found.append(ids.tolist())
        drawing.take(found[-1])
    samplers = [each.sampler() for each in settings]
    assert found == [[draw_next(each, row) for each, row in zip(samplers, step, strict=True)] for step in logits]


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.6])
def test_what_is_drawn_on_the_card_has_the_softmaxs_frequencies(top_p: float):
    """Pearson's chi-square of 32,000 draws, 64 rows at a time: within what one in a thousand fixed seeds exceeds."""
    vocab, rows, steps = 40, 64, 500
    device = find_device("cuda")
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(4))
    drawing = Drawing(rows, vocab, device)
    settings = [Sampling(temperature=0.9, top_p=top_p, seed=seed) for seed in range(rows)]
    way = Way.of(settings)
    drawing.start([each.sampler() for each in settings])
    found = torch.zeros(vocab, dtype=torch.float64)
    for _ in range(steps):
        drawing.send()
        ids = drawing.draw(logits.to("cuda").expand(rows, -1), way).cpu()
        found += torch.bincount(ids, minlength=vocab)
        drawing.take(ids.tolist())
    weights = (logits.double() / 0.9).softmax(dim=0)
    order = weights.argsort(descending=True)
    kept = order[weights[order].cumsum(dim=0) - weights[order] < top_p]
    assert found.sum() == found[kept].sum() == rows * steps
    expected = weights[kept] / weights[kept].sum() * rows * steps
    spread = 2 / (9 * (len(kept) - 1))
    bound = (len(kept) - 1) * (1 - spread + 3.09 * spread**0.5) ** 3
    assert ((found[kept] - expected) ** 2 / expected).sum() < bound


def test_a_kernel_that_raises_costs_a_drawn_decode_no_token(tiny: Path):
    both = []
    for nth in (0, 5):
        with _model_with(_RaisesAt(nth), tiny, "slow"):
            model = kernelmux.load(tiny)
            session = model.session(model.plan(parse_policy(FALLS_BACK, "p.toml"), device="cuda"), 400, sequences=2)
            sequences, ids = _opened(session, PROMPTS[:2])
            both.append(list(session.decode(sequences, ids, 8, DRAWN[:2])))
        assert len(session.walker.plan.banned) == (nth > 0)
    assert both[0] == both[1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3), Sampling(0.7, 0.9, 5, 0.1, 1.3)], ids=repr)
def test_logits_that_are_no_numbers_stop_a_captured_decode_and_the_card_goes_on(tmp_path: Path, monkeypatch, sampling):
    sound = tiny_model._weights

    def weights(shapes, seed):
        made = sound(shapes, seed)
        made["token_embd.weight"][7] = float("nan")
        return made

    monkeypatch.setattr(tiny_model, "_weights", weights)
    model = kernelmux.load(tiny_model.write_tiny_llama(tmp_path / "nan.gguf", tied=False))
    session = model.session(model.plan(use=[POLICIES["f32"]], device="cuda"), 400, sequences=3)
    sequences = [session.open() for _ in range(3)]
    with pytest.raises(LogitsError, match=r"^token 2, counted from the prompt's first, has no logits"):
        list(session.decode(sequences, [1, 7, 2], 6, sampling))
    assert session.walker.made.captured
    # One step: the token of the spoilt row may be the next that is drawn.
    assert len(list(session.decode([session.open()], [1], 1, sampling))) == 1
    torch.cuda.synchronize()
