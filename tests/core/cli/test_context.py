"""`--context`: a model that differs for short and for long contexts is the one for as many tokens as are asked for."""

from __future__ import annotations

import json

import pytest

import checkpoints
import kernelmux
from command import assert_one_line_error, call_command
from folders import write_tokenizer

pytest.importorskip("transformers", reason="transformers, which makes the checkpoint, is not installed")

SHORT, LONG = 32, 64
TEXT = "more than thirty-two tokens of this vocabulary"
REFERENCE = ("--use", "*=reference")


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.COMMON, "vocab_size", 1000)
        checkpoints.make_checkpoint("phi3-longrope", folder)
    write_tokenizer(folder, "byte level")
    assert SHORT < len(kernelmux.load(folder).encode(TEXT)) < LONG - 8
    return folder


def test_a_longer_prompt_is_told_what_to_ask_for_and_then_answered(phi3):
    asked = ("run", phi3, "-p", TEXT, "--max-tokens", 4, *REFERENCE)
    count = len(kernelmux.load(phi3).encode(TEXT)) + 3
    told = f"the model holds {SHORT}: shorten the prompt, or open it for longer contexts (--context {count}, or load("
    assert_one_line_error(call_command(*asked), told)
    answer = call_command(*asked, "--context", count)
    assert answer.code == 0, answer.err
    model = kernelmux.load(phi3, context=count)
    expected = "".join(model.generate(TEXT, model.plan(use=["*=reference"]), max_tokens=4))
    assert answer.out.startswith(expected)


def test_a_short_prompt_is_answered_by_either(phi3):
    """With other divisors, so that the graph is another one."""
    graphs = [call_command("graph", phi3, "--json", *more).out for more in ((), ("--context", SHORT + 1))]
    assert ["rope_factors_short" in graph for graph in graphs] == [True, False]
    assert ["rope_factors_long" in graph for graph in graphs] == [False, True]
    plans = [json.loads(call_command("plan", phi3, "--json", *more).out) for more in ((), ("--context", LONG))]
    assert plans[0]["fingerprint"] != plans[1]["fingerprint"]
    for more in ((), ("--context", LONG)):
        assert call_command("run", phi3, "-p", "a", "--max-tokens", 1, *REFERENCE, *more).code == 0


def test_info_tells_of_both(phi3):
    assert (
        f"context       {SHORT} tokens, opened for longer contexts {LONG} (--context)" in call_command("info", phi3).out
    )
    found = json.loads(call_command("info", phi3, "--context", LONG, "--json").out)["sizes"]
    assert (found["context"], found["longest"]) == (LONG, LONG)


@pytest.mark.parametrize(
    "command", [("run", "-p", "a"), ("plan",), ("graph",), ("info",), ("trace",), ("bench", "model")]
)
def test_more_than_the_model_holds_is_one_line(tiny, command):
    name, *options = command
    words, options = ((name, *options), []) if name == "bench" else ((name,), options)
    asked = ("--prompt", 1000) if name in ("trace", "bench") else ("--context", 1000)
    result = call_command(*words, tiny, *options, *asked)
    assert_one_line_error(result, "tokens was asked for, the model holds 256")


@pytest.mark.parametrize("command", [("trace",), ("bench", "model", "--context", 40)])
def test_commands_that_measure_open_it_for_what_they_run(phi3, command):
    asked = (*command[:2], phi3, *command[2:]) if command[0] == "bench" else (*command, phi3)
    result = call_command(*asked, "--prompt", 40, "--decode", 2, "--use", "*=torch,reference")
    assert result.code == 0, result.err
