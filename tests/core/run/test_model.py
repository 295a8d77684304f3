"""The Python API: load, plan, generate, forward; prompts of every kind; what a Generation counts."""

from __future__ import annotations

import io
import sys
import time
from itertools import zip_longest
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

import kernelmux
import kernelmux_torch.mul_mat
from command import TIMEOUT
from kernelmux.conformance.measure import compare
from kernelmux.errors import KernelmuxError, ModelError, PlanError
from kernelmux.plan.plan import Plan
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import Model, PromptOptions, load_random
from tiny_model import write_tiny_llama

F32 = "*=torch:f32,torch:sdpa,torch:rows"
POLICY = '[[rule]]\nop = "mul_mat"\nuse = "reference:f64"\n\n[defaults]\nuse = ["torch"]\n'
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    return model.plan(use=[F32])


def kernels(plan: Plan, op: str) -> set[str]:
    return {step.choice.name for step in plan.schedule(1, 1).steps if step.node.op == op}


def test_the_short_program_of_the_readme_streams_text(tiny: Path, tmp_path: Path):
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    model = kernelmux.load(str(tiny))
    plan = model.plan(policy=str(path))
    pieces = list(model.generate("Hello", plan=plan, max_tokens=12))
    assert len(pieces) > 1
    assert all(isinstance(piece, str) and piece for piece in pieces)
    assert kernels(plan, "mul_mat") == {"reference:f64"}
    assert kernels(plan, "rms_norm") == {"torch:f32"}


@pytest.mark.parametrize("kind", ["path", "text path", "policy"])
def test_a_policy_may_be_a_path_or_a_policy_and_use_outranks_it(model: Model, tmp_path: Path, kind: str):
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    policy = {"path": path, "text path": str(path), "policy": parse_policy(POLICY, "here")}[kind]
    assert kernels(model.plan(policy), "mul_mat") == {"reference:f64"}
    for use in (["mul_mat=torch:f32"], "mul_mat=torch:f32"):
        assert kernels(model.plan(policy, use=use), "mul_mat") == {"torch:f32"}


def test_forward_gives_float32_logits_of_every_position(model: Model, plan: Plan):
    ids = model.encode("hello and goodbye")
    logits = model.forward(ids, plan=plan)
    assert logits.shape == (len(ids), model.source.tokenizer.vocab_size)
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())


ASKED = {
    "forward": lambda model, plan: model.forward([104], plan),
    "generate": lambda model, plan: model.generate("hello", plan),
    "session": lambda model, plan: model.session(plan, 16),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_plan_for_another_models_graph_is_refused_with_both(model: Model, plan: Plan, tmp_path: Path, ask):
    other = kernelmux.load(write_tiny_llama(tmp_path / "q4.gguf", weight_type=GGMLQuantizationType.Q4_0))
    with pytest.raises(PlanError) as caught:
        ask(other, plan)
    for graph in (plan.graph, other.graph.with_cache_format(plan.policy.cache_format(plan.device))):
        assert f"{graph.name} (graph {graph.digest})" in str(caught.value)


def test_a_plan_for_an_equal_graph_runs_whatever_its_cache_holds(model: Model, tmp_path: Path):
    twin = kernelmux.load(write_tiny_llama(tmp_path / "twin.gguf"))
    for format in ("bf16", "f32"):
        plan = model.plan(parse_policy(f'[kv]\nformat = "{format}"\n', "here"), use=[F32])
        assert torch.equal(twin.forward([104, 105], plan), model.forward([104, 105], plan))


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("passed", ["policy.toml", "", Path("lock.json"), {"rule": []}], ids=repr)
def test_what_is_no_plan_is_refused_with_what_to_pass(model: Model, ask, passed):
    with pytest.raises(PlanError, match=r"plan=model\.plan\(FILE\)") as caught:
        ask(model, passed)
    assert repr(passed) in str(caught.value)


def test_forward_is_causal(model: Model, plan: Plan):
    """Tokens to come change nothing before them."""
    ids = model.encode("hello and goodbye")
    other = [*ids[:8], *reversed(ids[8:])]
    torch.testing.assert_close(model.forward(ids, plan)[:8], model.forward(other, plan)[:8], atol=1e-5, rtol=0)
    assert not torch.allclose(model.forward(ids, plan)[8:], model.forward(other, plan)[8:])


@pytest.mark.parametrize("ids", [[104, 105, 106], (104, 105, 106), range(104, 107)], ids=["list", "tuple", "range"])
def test_any_sequence_of_ids_will_do(model: Model, plan: Plan, ids):
    assert torch.equal(model.forward(ids, plan), model.forward([104, 105, 106], plan))
    assert model.encode(ids) == [104, 105, 106]


def test_text_and_its_token_ids_get_the_same_answer(model: Model, plan: Plan):
    ids = model.encode("hello")
    by_text, by_ids = (model.generate(prompt, plan, max_tokens=8) for prompt in ("hello", ids))
    assert "".join(by_text) == "".join(by_ids)
    assert by_text.ids == by_ids.ids


def test_messages_go_through_the_files_chat_template(model: Model, plan: Plan):
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = model.encode(CHAT)
    assert model.source.tokenizer.decode(ids) == text
    assert ids == model.encode(text, PromptOptions(parse_special=True))
    assert ids != model.encode(text), "a prompt that is text has no control tokens"
    assert model.generate(CHAT, plan, max_tokens=1).prompt_ids == ids


def test_messages_without_a_chat_template_are_a_model_error(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "plain.gguf", extra={"tokenizer.chat_template": None})
    model = kernelmux.load(path)
    assert model.encode("hello")
    with pytest.raises(ModelError, match="has no chat template; give one, or the prompt as text"):
        model.generate(CHAT)


@pytest.mark.parametrize("prompt", ["", []], ids=["text", "ids"])
def test_a_prompt_without_tokens_is_a_model_error(model: Model, prompt):
    with pytest.raises(ModelError, match="no tokens"):
        model.generate(prompt)
    with pytest.raises(ModelError, match="no tokens"):
        model.forward(model.encode(prompt))


@pytest.mark.parametrize("id", [-1, 269, 10**12])
def test_ids_out_of_the_vocabulary_are_a_model_error(model: Model, id: int):
    for use in (model.generate, model.forward, model.encode):
        with pytest.raises(ModelError, match=f"token id {id} is not in the vocabulary of 269"):
            use([5, id])


@pytest.mark.parametrize(
    "prompt",
    [[104, "hello"], ["hello"], [104, CHAT[0]], [104.5]],
    ids=["id and text", "texts", "id and message", "float"],
)
def test_a_prompt_that_is_no_text_no_ids_and_no_messages_is_refused_not_cut(model: Model, prompt):
    with pytest.raises(ModelError, match="a prompt is text, token ids or chat messages, not "):
        model.encode(prompt)


@pytest.mark.parametrize("prompt", [b"hello", bytearray(b"hello"), None, 5], ids=repr)
def test_a_prompt_of_another_type_is_refused_by_its_name(model: Model, prompt):
    for use in (model.generate, model.forward, model.encode):
        with pytest.raises(ModelError) as caught:
            use(prompt)
        told = f"a prompt is text, token ids or chat messages, not {type(prompt).__name__} ({prompt!r})"
        assert str(caught.value) == told


WRONG = {
    "max_tokens is a whole number, not str ('5')": lambda model: model.generate("hi", max_tokens="5"),
    "max_tokens is a whole number, not float (2.5)": lambda model: model.generate("hi", max_tokens=2.5),
    "temperature is a number, not str ('hot')": lambda model: model.generate("hi", temperature="hot"),
    "top_k is a whole number, not float (0.5)": lambda model: model.generate("hi", top_k=0.5),
    "options are PromptOptions, not dict ({})": lambda model: model.generate("hi", options={}),
    "a policy is a file's path, 'exact' or a Policy, not dict ({})": lambda model: model.plan({}),
    "max_rows is a whole number, not str ('8')": lambda model: model.plan(max_rows="8"),
    "a device is its name, as 'cuda:0', or a Device, not int (0)": lambda model: model.plan(device=0),
    "`use` is OP=KERNEL, as 'mul_mat=torch:int4', or a list of such, not int (5)": lambda model: model.plan(use=5),
    "or a list of such, not NoneType (None)": lambda model: model.plan(use=[None]),
    "a lock file is a path, not dict ({})": lambda model: model.locked_plan({}),
    "tokens is a whole number, not str ('16')": lambda model: model.session(model.plan(use=F32), "16"),
    "a model is the path of a file or of a folder, not NoneType (None)": lambda model: kernelmux.load(None),
    "a random model is its name, as 'llama-8b:Q4_K_M', not int (8)": lambda model: load_random(8),
    "context is a whole number, not str ('9')": lambda model: kernelmux.load("model.gguf", "9"),
}


@pytest.mark.parametrize(("told", "ask"), WRONG.items(), ids=WRONG)
def test_an_argument_of_another_type_is_told_of_at_the_door(model: Model, told: str, ask):
    with pytest.raises(KernelmuxError) as caught:
        ask(model)
    assert str(caught.value).endswith(told)


@pytest.mark.parametrize(("name", "number"), [("max_rows", 0), ("max_rows", -3), ("context", -5)])
def test_a_plan_for_fewer_rows_or_tokens_than_there_can_be_is_refused(model: Model, name: str, number: int):
    with pytest.raises(KernelmuxError, match=f"{name}={number}"):
        model.plan(**{name: number})


def test_numbers_of_an_array_library_are_numbers(model: Model, plan: Plan):
    options = {"max_tokens": np.int64(2), "temperature": np.float32(0.5), "top_k": np.int32(3), "seed": np.int64(1)}
    assert model.generate("hello", plan, **options).max_tokens == 2


def test_ids_from_an_array_library_are_ids(model: Model):
    assert model.encode(list(np.array([104, 105]))) == [104, 105]


def test_a_prompt_may_fill_the_context_and_not_exceed_it(model: Model, plan: Plan):
    assert len(model.forward([104] * 256, plan)) == 256
    with pytest.raises(ModelError, match=r"257 tokens, the model holds 256"):
        model.forward([104] * 257, plan)


def test_prompt_and_answer_together_may_fill_the_context_and_not_exceed_it(model: Model, plan: Plan):
    # The last token is not fed, and needs no room.
    answer = model.generate([104] * 250, plan, max_tokens=7)
    "".join(answer)
    assert len(answer.ids) == 7
    with pytest.raises(ModelError, match=r"250 tokens and 8 are to follow, the model holds 256"):
        model.generate([104] * 250, plan, max_tokens=8)


def test_the_pieces_joined_are_the_text_of_the_ids(model: Model, plan: Plan):
    answer = model.generate("hello", plan, max_tokens=20, temperature=2.0, seed=1)
    assert "".join(answer) == model.source.tokenizer.decode(answer.ids)


def test_an_answer_ends_at_the_models_end_token_which_is_not_text(model: Model, plan: Plan, tmp_path: Path):
    """The same weights, in a file that says that the second token of the greedy answer ends it."""
    free = model.generate("hello", plan, max_tokens=20)
    list(free)
    end = free.ids[1]
    assert end != free.ids[0]
    ending = kernelmux.load(write_tiny_llama(tmp_path / "end.gguf", extra={"tokenizer.ggml.eos_token_id": end}))
    answer = ending.generate("hello", ending.plan(use=[F32]), max_tokens=20)
    assert "".join(answer) == model.source.tokenizer.decode(free.ids[:1])
    assert answer.ids == free.ids[:2]


def test_a_seed_makes_an_answer_reproducible(model: Model, plan: Plan):
    first, again, other = (
        "".join(model.generate("hello", plan, max_tokens=16, temperature=1.0, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_two_answers_at_once_do_not_disturb_each_other(model: Model, plan: Plan):
    prompts = ("hello", "and then")
    alone = ["".join(model.generate(prompt, plan, max_tokens=10)) for prompt in prompts]
    both = zip_longest(*(model.generate(prompt, plan, max_tokens=10) for prompt in prompts), fillvalue="")
    assert ["".join(pieces) for pieces in zip(*both, strict=True)] == alone


def test_an_answer_counts_its_tokens_and_its_speed(model: Model, plan: Plan):
    answer = model.generate("hello and", plan, max_tokens=8)
    assert answer.ids == []
    assert (answer.prompt_rate, answer.decode_rate) == (0, 0)
    list(answer)
    assert answer.prompt_ids == model.encode("hello and")
    assert len(answer.ids) == 8
    assert answer.prompt_rate == pytest.approx(len(answer.prompt_ids) / answer.prompt_seconds)
    assert answer.decode_rate == pytest.approx(7 / answer.decode_seconds)


def test_an_answer_that_is_left_early_has_counted_what_ran(model: Model, plan: Plan):
    answer = model.generate([104], plan, max_tokens=50)
    for pieces, _ in enumerate(answer, 1):
        if pieces == 3:
            break
    assert 3 <= len(answer.ids) < 50


def test_preparing_an_answer_tells_how_far_it_is_and_changes_no_word(model: Model, plan: Plan):
    expected = "".join(model.generate("hello", plan, max_tokens=8))
    answer = model.generate("hello", plan, max_tokens=8)
    last = {each.stage: each for each in answer.prepare()}
    assert list(last) == ["placing steps", "packing weights", "compiling kernels", "binding steps"]
    assert all(each.done == each.total > 0 for each in last.values())
    assert "".join(answer) == expected


def test_4_bit_weights_give_logits_close_to_those_of_the_reference(without_numba: None, tmp_path: Path):
    """The default plan at few rows, where it keeps the weights in 4 bits and rounds activations to bfloat16."""
    path = write_tiny_llama(tmp_path / "q4.gguf", weight_type=GGMLQuantizationType.Q4_0)
    model = kernelmux.load(path)
    ids = model.encode("hello and")
    plan = model.plan()
    steps = plan.schedule(len(ids), len(ids)).steps
    assert "torch:int4" in {step.choice.name for step in steps if step.node.op == "mul_mat"}
    wanted = model.forward(ids, model.plan(use=["*=reference:f32"])).double()
    assert compare(model.forward(ids, plan), wanted, 1e-3).failures == ()


def test_answers_one_after_another_pack_once(model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    """As a loop over prompts has it: what the last answer packed is there for the next one, and for logits."""
    fresh = kernelmux.load(model.source.file.path)
    "".join(fresh.generate("hello", plan, max_tokens=2))
    monkeypatch.setattr(kernelmux_torch.mul_mat.F32, "prepare", None)
    assert "".join(fresh.generate("hello", plan, max_tokens=2)) is not None
    assert len(fresh.forward([1, 2], plan)) == 2


def test_logits_that_wait_long_for_packing_say_so_at_a_terminal(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    told, prepare = Event(), kernelmux_torch.mul_mat.F32.prepare

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            count = super().write(text)
            if text.endswith("\n"):
                told.set()
            return count

    def slowly(*arguments: object) -> object:
        assert told.wait(TIMEOUT)
        return prepare(*arguments)

    model = kernelmux.load(tiny)
    monkeypatch.setattr("kernelmux.run.model.QUIET", 0.0)
    monkeypatch.setattr(kernelmux_torch.mul_mat.F32, "prepare", slowly)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert len(model.forward([1, 2], model.plan(use=[F32]))) == 2
    assert sys.stderr.getvalue() == "kernelmux: packing weights and compiling kernels before the first logits\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_that_waits_long_says_so_at_a_terminal(
    tiny: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr("kernelmux.run.model.QUIET", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    answer = kernelmux.load(tiny).generate("hello", max_tokens=1)
    steps = list(answer.prepare())

    def slowly():
        time.sleep(0.2)
        yield from steps

    monkeypatch.setattr(answer, "prepare", slowly)
    assert "".join(answer)
    assert capsys.readouterr().err.count("packing weights") == terminal
