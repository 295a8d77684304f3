"""Logits of which no token follows end an answer in one line, whoever asked for tokens; `forward` hands them out."""

import re

import numpy as np
import pytest
import torch

import kernelmux
import kernelmux_reference
import tiny_model
from command import assert_one_line_error, call_command
from fake_backend import FakeKernel, compute
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.errors import LogitsError
from kernelmux.policy.policy import parse_policy
from kernelmux.run.pages import CachedSequence
from kernelmux.run.sampling import Sampling
from kernelmux.run.soundness import mark, read_ids

REFERENCE = ["*=reference"]
FADING = '[[rule]]\nnode = "logits"\nuse = "fading"\n[defaults]\nuse = ["reference"]\n'
SAID = r"token {}, counted from the prompt's first, has no logits to take it by: those of tiny are NaN or infinite, "
DRAWN = {
    "greedy": {},
    "drawn": {"temperature": 1.0},
    "cold": {"temperature": 0.0, "repetition_penalty": 1.3},
    "cut": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
}


@pytest.fixture(scope="module", params=["nan", "inf", "-inf"])
def broken(request, tmp_path_factory):
    """A model whose last norm makes all logits NaN, or the highest or all of them infinite."""
    path = tmp_path_factory.mktemp("broken") / "broken.gguf"
    sound = tiny_model._weights

    def weights(shapes, seed):
        made = sound(shapes, seed)
        if request.param == "nan":
            made["output_norm.weight"][:] = np.nan
        else:
            # Of one sign, and each product overflows.
            made["output_norm.weight"][:] = 0
            made["output_norm.weight"][0] = 1e38
            made["token_embd.weight"][:, 0] = 1e30
            if request.param == "-inf":
                made["output.weight"][:, 0] = -1e30
            else:
                made["output.weight"][:, 0] = 1e30
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "_weights", weights)
        return tiny_model.write_tiny_llama(path, tied=False, vocab=1500)


class Fading(FakeKernel):
    """Computes, but spoils what it writes from its n-th launch on, as a kernel does whose sums overflow one day."""

    def __init__(self, nth, value):
        super().__init__(work=self._launch)
        self.nth, self.value, self.count = nth, value, 0

    def _launch(self, node, tensors):
        compute(node, tensors)
        self.count += 1
        if self.count >= self.nth:
            tensors.outputs[0].fill_(self.value)


@pytest.mark.parametrize("options", DRAWN.values(), ids=DRAWN)
def test_a_run_ends_in_one_line_that_says_which_token_and_how_to_find_the_node(broken, options):
    given = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    result = call_command("run", broken, "-p", "hello", "--max-tokens", 4, "--use", *REFERENCE, *given)
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert re.match("kernelmux: LogitsError: " + SAID.format(3), line)
    for way in ("--check-nan", "kernelmux bisect", "--exact", "--use '*=reference'", "the model's weights"):
        assert way in line
    assert "Traceback" not in result.err
    assert result.out.strip() == ""


def test_the_scripts_form_says_so_too(broken):
    result = call_command("run", broken, "-p", "hello", "--max-tokens", 4, "--use", *REFERENCE, "--json")
    assert_one_line_error(result, "LogitsError", "token 3, ")


def test_a_bench_of_such_a_model_is_no_figure(broken):
    asked = ("--prompt", 4, "--context", 4, "--decode", 2, "--max-rows", 4, "--use", *REFERENCE)
    assert_one_line_error(call_command("bench", "model", broken, *asked), "LogitsError", "token 6, ")


def test_forward_hands_out_what_the_logits_are(broken):
    model = kernelmux.load(broken)
    logits = model.forward([1, 2, 3], model.plan(use=REFERENCE))
    assert logits.shape == (3, 1500)
    assert not logits.amax(dim=-1).isfinite().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", DRAWN.values(), ids=DRAWN)
def test_what_goes_wrong_in_the_middle_stops_there_and_the_session_is_free_again(tiny, options, value):
    kernel = Fading(4, value)
    with registry.isolated(fading=backend(mul_mat=kernel), reference=kernelmux_reference):
        model = kernelmux.load(tiny)
        session = model.session(model.plan(parse_policy(FADING, "p.toml")), 128, sequences=2)
        sequences = [session.open() for _ in range(2)]
        steps = session.decode(sequences, [1, 2], 8, Sampling(**options))
        ids = [next(steps) for _ in range(3)]
        assert all(0 <= id < 269 for row in ids for id in row)
        with pytest.raises(LogitsError, match=SAID.format(5)):
            next(steps)
        assert session.feed(sequences[0], [1]).shape == (1, 269)


def test_a_text_so_far_is_there_where_it_stops(tiny):
    kernel = Fading(4, float("nan"))
    with registry.isolated(fading=backend(mul_mat=kernel), reference=kernelmux_reference):
        model = kernelmux.load(tiny)
        answer = model.generate("hello", model.plan(parse_policy(FADING, "p.toml")))
        for _ in answer.prepare():
            pass
        kernel.count = 0
        with pytest.raises(LogitsError, match=SAID.format(6)):
            list(answer)
        assert len(answer.ids) == 3


def test_marked_ids_are_the_ids_and_none_where_the_highest_logit_is_not_finite(tiny):
    plan = kernelmux.load(tiny).plan(use=REFERENCE, max_rows=4)
    ids = torch.tensor([0, 7, 128_255, 2**24 - 1])
    out = torch.zeros(4)
    mark(ids, torch.tensor([3.4e38, -3.4e38, 0.0, -0.0]), out)
    sequences = [CachedSequence() for _ in range(4)]
    assert read_ids(out.tolist(), plan, sequences) == ids.tolist()
    sequences[2].length = 11
    for value in (float("nan"), float("inf"), -float("inf")):
        mark(ids, torch.tensor([1.0, 2.0, value, 3.0]), out)
        with pytest.raises(LogitsError, match=SAID.format(12)):
            read_ids(out.tolist(), plan, sequences)
