"""`kernelmux run`: the answer on stdout alone, what it cost on stderr, JSON for scripts, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import kernelmux
import kernelmux_reference
from command import TIMEOUT, Result, assert_one_line_error, call_command, run_command, start_command
from fake_backend import FakeKernel, whole_backend
from kernelmux.cli.run import _slower_than_predicted
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.graph.formats import human_bytes
from kernelmux.plan.speed import Speeds
from kernelmux.run.model import Model, PromptOptions
from tiny_model import write_tiny_llama

F32 = ("--use", "*=torch:f32,torch:sdpa,torch:rows")
OF_TEMPLATES = ("--chat-template", "--tools", "--documents")


class Raising(FakeKernel):
    """Raises where it is launched, which is the line that messages are to name."""

    def bind(self, node, tensors, stream):
        def launch():
            raise OverflowError("too many rows")

        return launch


LINE = Raising.bind.__code__.co_firstlineno + 2


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are packed before they are multiplied."""
    path = tmp_path_factory.mktemp("stored") / "stored.gguf"
    return write_tiny_llama(path, weight_type=gguf.GGMLQuantizationType.Q4_0)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is too long to fill: it answers until it is stopped."""
    return write_tiny_llama(tmp_path_factory.mktemp("endless") / "endless.gguf", context=100_000)


def answer(*arguments: object) -> dict[str, Any]:
    result = call_command("run", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def test_stdout_holds_the_answer_alone_and_stderr_what_it_cost(tiny: Path, model: Model):
    """In a process of its own, whose output is no terminal: no escape sequences either."""
    result = run_command("run", tiny, "-p", "hello", "--max-tokens", 12, *F32)
    expected = "".join(model.generate("hello", model.plan(use=F32[1:]), max_tokens=12))
    assert result.code == 0
    assert result.out == f"{expected}\n"
    assert "prompt 2 tokens" in result.err
    assert "answer 12 tokens" in result.err
    assert "tokens/s" in result.err
    assert "torch:f32" in result.err
    # A busy machine may have said that decoding was slow, too.
    summary = re.findall(r"^(decoding|prompts|memory) (?!was )", result.err, re.MULTILINE)
    assert summary == ["decoding", "prompts", "memory"]
    assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize(("tokens", "slower", "told"), [(4, 3.0, ["3.0 times"]), (3, 3.0, []), (4, 1.5, [])])
def test_an_answer_that_came_far_slower_than_predicted_says_so(model: Model, tokens: int, slower: float, told: list):
    answer = model.generate("hello", model.plan(use=F32[1:]), max_tokens=tokens)
    answer.ids = [1] * tokens
    answer.decode_seconds = slower * (tokens - 1) / Speeds(answer.session.plan).at(1).tokens_per_second
    said = list(_slower_than_predicted(answer))
    assert [line.partition("decoding was ")[2].partition(" slower")[0] for line in said] == told


def test_json_holds_text_ids_rates_and_kernels(tiny: Path, model: Model):
    document = answer(tiny, "-p", "hello", "--max-tokens", 12, *F32)
    plan = model.plan(use=F32[1:])
    expected = model.generate("hello", plan, max_tokens=12)
    assert document["text"] == "".join(expected)
    assert document["ids"] == expected.ids
    assert document["prompt_ids"] == model.encode("hello")
    assert document["prompt_tokens_per_second"] > 0
    assert document["tokens_per_second"] > 0
    assert document["interrupted"] is False
    assert document["kernels"]["mul_mat"] == {"torch:f32": 15}
    assert document["fingerprint"] == plan.fingerprint
    assert document["summary"]["decoding"]["kernels"]["mul_mat"] == {"torch:f32": 15}
    assert document["summary"]["kv_per_token"] == plan.kv_bytes_per_token


@pytest.mark.slow
def test_the_time_to_the_first_token_is_told_by_stages(tiny: Path):
    asked = ("run", tiny, "-p", "hello", "--max-tokens", 2, *F32)
    stages = ["starting Python", "importing torch", "opening the model", "planning"]
    stages += [
        "reading the vocabulary",
        "placing steps",
        "packing weights",
        "compiling kernels",
        "binding steps",
        "prompt",
    ]
    result = run_command(*asked, "--timing")
    (line,) = re.findall(r"^first token after .*(?:\n  .*)*", result.err, re.MULTILINE)
    # Where it is broken depends on how long each stage took.
    line = " ".join(line.split())
    whole, *each = map(float, re.findall(r"(\d+\.\d+) s\b", line))
    assert [line.find(stage) >= 0 for stage in stages] == [True] * len(each) == [True] * len(stages)
    assert whole == pytest.approx(sum(each), abs=0.005 * len(each) + 0.005)
    assert "first token" not in run_command(*asked).err
    timing = json.loads(run_command(*asked, "--json").out)["timing"]
    assert list(timing) == [*stages, "first token"]
    assert all(seconds >= 0 for seconds in timing.values())


@pytest.mark.slow
def test_packed_weights_are_kept_and_mapped_where_asked_for(stored: Path):
    asked = ("run", stored, "-p", "hello", "--max-tokens", 4, "--use", "*=torch:f32,torch:sdpa,torch:rows")
    folder = Path(os.environ["KERNELMUX_CACHE"], "packed")
    plain = json.loads(call_command(*asked, "--json").out)
    assert plain["packed_bytes_from_cache"] == 0
    assert not folder.exists()
    first, second = (run_command(*asked, "--cache-packed", "--timing") for _ in range(2))
    assert first.out == second.out == plain["text"] + "\n"
    told = [re.search(r"packed weights (.+), of which (.+) came from the cache", each.err) for each in (first, second)]
    assert [each[1] for each in told] == [human_bytes(plain["packed_bytes"])] * 2
    assert told[0][2] == "0 B" != told[1][2]
    assert "mapping packed weights" not in first.err
    assert re.search(r"looking\s+up\s+packed\s+weights\s+\d.*mapping\s+packed\s+weights\s+\d", second.err, re.DOTALL)
    document = json.loads(call_command(*asked, "--cache-packed", "--json").out)
    assert 0 < document["packed_bytes_from_cache"] <= document["packed_bytes"]
    assert document["timing"]["mapping packed weights"] > 0
    assert not said(first) + said(second)


def said(result: Result) -> list[str]:
    """What is told beside the answer and how far it has come, which is told where it takes long."""
    return [line for line in result.err.splitlines() if line.startswith("kernelmux:")]


def test_a_damaged_file_of_packed_weights_is_one_line(stored: Path):
    asked = ("run", stored, "-p", "hello", "--max-tokens", 2, "--cache-packed", "--json", *F32)
    assert not said(call_command(*asked))
    file = next(Path(os.environ["KERNELMUX_CACHE"], "packed").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    (line,) = said(call_command(*asked))
    assert line.startswith(f"kernelmux: {file} is not used, torch/f32 of ")
    assert " is packed anew: it has " in line
    assert not said(call_command(*asked))


def test_weights_at_random_are_not_kept_which_is_one_line():
    result = call_command("run", "--random", "tiny:Q4_0", "-p", "hi", "--max-tokens", 2, "--cache-packed", "--json")
    (line,) = said(result)
    assert result.code == 0
    assert "random:tiny:Q4_0 is no file" in line


def test_ctrl_c_leaves_no_part_of_a_file(endless: Path):
    process = start_command("run", endless, "-p", "hello", "--max-tokens", 90_000, "--cache-packed", "--use", "*=torch")
    assert process.stdout is not None
    process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "Traceback" not in err.decode()
    folder = Path(os.environ["KERNELMUX_CACHE"], "packed")
    assert not folder.exists() or not [*folder.glob("tmp*")]


@pytest.mark.parametrize("what", ["model", "policy", "plan"])
def test_captured_cases_do_not_take_the_place_of_what_the_run_reads(tiny: Path, tmp_path: Path, what: str):
    files = {"model": tmp_path / "tiny.gguf", "policy": tmp_path / "p.toml", "plan": tmp_path / "lock.json"}
    files["model"].write_bytes(tiny.read_bytes())
    files["policy"].write_text("fuse = false\n")
    assert call_command("plan", tiny, "--lock", files["plan"]).code == 0
    before = files[what].read_bytes()
    link = tmp_path / "cases.json"
    link.symlink_to(files[what])
    asked = ("--plan", files["plan"]) if what == "plan" else ("--policy", files["policy"])
    for written in (files[what], link):
        result = call_command("run", files["model"], "-p", "hello", *asked, "--capture-cases", written)
        assert (result.code, result.out) == (2, "")
        assert "--capture-cases" in result.err
        assert f"is the {what} asked for: name another file" in result.err
        assert files[what].read_bytes() == before


def test_chat_asks_through_the_models_template(tiny: Path, model: Model):
    document = answer(tiny, "-p", "hello", "--chat", "--max-tokens", 4)
    assert document["prompt_ids"] == model.encode([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("chat", [False, True])
def test_control_tokens_of_a_prompt_are_text_unless_asked_for(tiny: Path, chat: bool):
    model = kernelmux.load(tiny)
    text = "a<|im_end|>b"
    prompt = [{"role": "user", "content": text}] if chat else text
    ways = ("--chat",) if chat else ()
    plain = answer(tiny, "-p", text, "--max-tokens", 1, *ways)["prompt_ids"]
    parsed = answer(tiny, "-p", text, "--max-tokens", 1, *ways, "--parse-special")["prompt_ids"]
    assert plain == model.encode(prompt)
    assert parsed == model.encode(prompt, PromptOptions(parse_special=True))
    (end,) = model.source.tokenizer.encode("<|im_end|>", add_special=False, parse_special=True)
    assert (plain.count(end), parsed.count(end)) == ((1, 2) if chat else (0, 1))


def test_what_a_template_does_not_read_is_said(tiny: Path, tmp_path: Path):
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    said = call_command("run", tiny, "-p", "a", "--chat", "--max-tokens", 1, "--tools", tmp_path / "tools.json").err
    assert "kernelmux: the chat template does not read tools: they are not used" in said
    assert "documents" not in said


def test_a_template_tools_and_documents_come_from_files(tiny: Path, tmp_path: Path):
    files = {"chat.jinja": "{{ tools | tojson }}{{ documents[0].text }}{{ messages[0].content }}"}
    files |= {"tools.json": '[{"name": "f"}]', "documents.json": '[{"text": "d"}]'}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    options = [f"{option}={tmp_path / name}" for option, name in zip(OF_TEMPLATES, files, strict=True)]
    ids = answer(tiny, "-p", "hello", "--chat", "--max-tokens", 1, *options)["prompt_ids"]
    assert kernelmux.load(tiny).source.tokenizer.decode(ids) == '[{"name": "f"}]dhello'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "is no JSON"),
        (b"{}", "a JSON list of objects is needed"),
        (b"[1]", "a JSON list of objects is needed"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_a_file_of_tools_that_is_none_is_one_line(tiny: Path, tmp_path: Path, content: bytes | None, message: str):
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_bytes(content)
    assert_one_line_error(call_command("run", tiny, "-p", "a", "--chat", "--tools", file), "tools.json", message)


@pytest.mark.parametrize("option", OF_TEMPLATES)
def test_what_is_for_a_template_needs_one(tiny: Path, option: str):
    result = call_command("run", tiny, "-p", "a", option, "x")
    assert result.code == 2
    assert "it is for a chat template" in result.err


def test_a_prompt_may_be_any_text(tiny: Path):
    text = "naïve café, 東京 🙂\n-p --json"
    document = answer(tiny, "-p", text, "--max-tokens", 1)
    assert kernelmux.load(tiny).source.tokenizer.decode(document["prompt_ids"]) == text


def test_a_seed_reproduces_an_answer_and_another_gives_another(tiny: Path):
    hot = ("--temperature", 1.5, "--top-p", 0.95, "--top-k", 100, "--max-tokens", 16)
    first, again, other = (answer(tiny, "-p", "hello", *hot, "--seed", seed)["ids"] for seed in (5, 5, 6))
    assert first == again != other


def test_without_a_temperature_the_seed_changes_nothing(tiny: Path):
    assert answer(tiny, "-p", "hello", "--seed", 5)["ids"] == answer(tiny, "-p", "hello", "--seed", 6)["ids"]


def test_sampling_options_reach_the_sampler(tiny: Path):
    greedy = answer(tiny, "-p", "hello", "--max-tokens", 16)["ids"]
    assert answer(tiny, "-p", "hello", "--max-tokens", 16, "--temperature", 1.5)["ids"] != greedy
    for option in (("--top-k", 1), ("--top-p", 1e-9)):
        assert answer(tiny, "-p", "hello", "--max-tokens", 16, "--temperature", 1.5, *option)["ids"] == greedy


def test_a_policy_and_use_choose_the_kernels_that_ran(tiny: Path, tmp_path: Path):
    path = tmp_path / "policy.toml"
    path.write_text('[defaults]\nuse = ["reference"]\n')
    document = answer(tiny, "-p", "hello", "--max-tokens", 2, "--policy", path, "--use", "add=torch")
    assert set(document["kernels"]["mul_mat"]) == {"reference:f32"}
    assert set(document["kernels"]["add"]) == {"torch:f32"}


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(tiny: Path):
    result = call_command("run", tiny, "-p", "x" * 300, "--max-tokens", 5)
    assert_one_line_error(result, "300 tokens", "256")
    assert_one_line_error(call_command("run", tiny, "-p", "x", "--max-tokens", 1000), "1000", "256", "--max-tokens")


def test_a_kernel_that_raises_is_one_line_with_its_place_and_with_verbose_the_traceback(tiny: Path):
    def run(*options: str):
        with registry.isolated(mine=whole_backend(embed=Raising())):
            return call_command("run", tiny, "-p", "hello", "--max-tokens", 2, "--json", *options)

    result = run()
    assert_one_line_error(result, "mine:f32 raised at ", f"OverflowError: too many rows (test_run.py:{LINE})")
    whole = run("--verbose")
    assert (whole.code, whole.out, whole.err.splitlines()[-1]) == (2, "", result.err.strip())
    assert "in launch\n" in whole.err


def test_a_kernel_that_gave_way_is_told_and_the_plan_that_ran_is_summarised(tiny: Path, tmp_path: Path):
    path = tmp_path / "p.toml"
    path.write_text('[defaults]\nuse = ["mine"]\non_error = "next"\n')
    arguments = (tiny, "-p", "hello", "--max-tokens", 2, "--policy", path)
    with registry.isolated(mine=backend(embed=Raising()), reference=kernelmux_reference):
        made = kernelmux.load(tiny).plan(path)
        text, data = (call_command("run", *arguments, *options) for options in ((), ("--json",)))
    said = f"OverflowError: too many rows (test_run.py:{LINE})"
    told = f"kernelmux: mine:f32 raised at embed, logit_rows.select: {said}; reference:f32 runs instead"
    assert [line for line in text.err.splitlines() if "raised" in line] == [told]
    assert data.err == f"{told}\n"
    document = json.loads(data.out)
    assert document["kernels"]["embed"] == {"reference:f32": 2}
    assert re.search(r"decoding .*\n +all \d+ ops: reference:f32", text.err)
    assert set(document["summary"]["decoding"]["kernels"]["embed"]) == {"reference:f32"}
    assert document["replaced"] == [
        {"node": node, "kernel": "mine:f32", "error": said, "instead": ["reference:f32"]}
        for node in ("embed", "logit_rows.select")
    ]
    assert document["fingerprint"] != made.fingerprint
    assert made.fingerprint not in text.err
    assert document["fingerprint"] in text.err


def test_verbose_shows_what_a_message_was_made_from(tiny: Path, tmp_path: Path):
    path = tmp_path / "policy.toml"
    path.write_text("[[rule")
    result = call_command("run", tiny, "-p", "hello", "--policy", path, "--verbose")
    assert "TOMLDecodeError" in result.err
    assert result.err.splitlines()[-1].startswith(f"kernelmux: PolicyError: {path}:1: not TOML")


def test_an_empty_prompt_is_refused_where_it_has_no_tokens(tiny: Path, tmp_path: Path):
    assert_one_line_error(call_command("run", tiny, "-p", ""), "no tokens")
    path = write_tiny_llama(tmp_path / "bos.gguf", extra={"tokenizer.ggml.add_bos_token": True})
    assert len(answer(path, "-p", "", "--max-tokens", 1)["prompt_ids"]) == 1


def test_chat_without_a_template_says_to_ask_in_plain_text(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "plain.gguf", extra={"tokenizer.chat_template": None})
    assert_one_line_error(call_command("run", path, "-p", "hello", "--chat"), "plain.gguf", "no chat template")


def test_a_file_without_a_tokenizer_says_what_it_lacks(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "mute.gguf", extra={"tokenizer.ggml.model": None})
    assert_one_line_error(call_command("run", path, "-p", "hello"), "mute.gguf", "tokenizer.ggml.model")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--top-p", "-0.5"), ("--top-p", "0"), ("--top-p", "1.5"), ("--top-p", "nan"), ("--seed", str(2**64))],
)
def test_sampling_numbers_out_of_range_are_one_line_that_names_the_setting(tiny: Path, option: str, value: str):
    result = call_command("run", tiny, "-p", "hello", "--temperature", "1", option, value)
    assert_one_line_error(result, option.strip("-").replace("-", "_"))


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["--use", "mul_mat=troch"], ["unknown backend 'troch'", "did you mean 'torch'?"]),
        (["--policy", "none.toml"], ["none.toml", "No such file"]),
        (["--device", "gpu"], ["'gpu'", "known: cpu"]),
    ],
    ids=["use", "policy", "device"],
)
def test_bad_choices_stop_a_run_before_it_answers(tiny: Path, arguments: list[str], hints: list[str]):
    assert_one_line_error(call_command("run", tiny, "-p", "hello", *arguments), *hints)


def test_a_model_file_that_is_missing_is_one_line(tmp_path: Path):
    assert_one_line_error(call_command("run", tmp_path / "none.gguf", "-p", "hello"), "none.gguf", "no such file")


def test_ctrl_c_ends_an_answer_with_the_text_so_far_and_exit_code_130(endless: Path):
    process = start_command("run", endless, "-p", "hello", "--max-tokens", 90_000)
    assert process.stdout is not None
    begun = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=TIMEOUT)
    text = (begun + rest).decode()
    assert process.returncode == 130
    assert text.endswith("\n")
    assert len(text) > 2
    assert "tokens/s" in err.decode()
    assert "Traceback" not in err.decode()


def test_ctrl_c_of_a_json_run_leaves_whole_json_that_says_so(monkeypatch: pytest.MonkeyPatch, endless: Path):
    """Within this process, as nothing outside tells when a run that prints nothing has begun."""
    calls = iter(range(20))

    def interrupt(logits: torch.Tensor, rows: object, uniforms: torch.Tensor) -> torch.Tensor:
        if next(calls) == 10:
            raise KeyboardInterrupt
        return torch.tensor([[104]])

    monkeypatch.setattr("kernelmux.run.drawing.draw_on_host", interrupt)
    result = call_command("run", endless, "-p", "hello", "--max-tokens", 90_000, "--temperature", 1, "--json")
    assert result.code == 130
    document = json.loads(result.out)
    assert document["interrupted"] is True
    assert document["text"] == "h" * 10 == "h" * len(document["ids"])


def test_a_random_model_answers_with_tokens_numbers(tiny: Path):
    document = answer("--random", "tiny:Q4_K_M", "-p", "hi", "--max-tokens", 5)
    assert len(document["prompt_ids"]) == 2
    assert len(document["ids"]) == 5


def test_one_model_is_named_a_file_or_a_random_one(tiny: Path):
    for arguments in ((), (tiny, "--random", "tiny:f32")):
        result = call_command("run", *arguments, "-p", "hi")
        assert result.code == 2
        assert "--random SHAPE:FORMAT" in result.err


def test_an_unknown_random_model_is_one_line():
    assert_one_line_error(call_command("run", "--random", "tny:f32", "-p", "hi"), "did you mean 'tiny'")


def test_settings_without_effect_are_told_and_impossible_ones_refused_before_anything_is_opened(tiny: Path):
    asked = ("run", tiny, "-p", "hello", "--max-tokens", 1, *F32)
    told = "--top-p and --top-k have no effect at temperature 0"
    assert told in call_command(*asked, "--top-p", 0.5, "--top-k", 3).err
    assert "no effect" not in call_command(*asked, "--top-p", 0.5, "--temperature", 1).err
    assert_one_line_error(call_command("run", "no-such-file.gguf", "-p", "hello", "--top-p", 2), "top_p=2")


def test_token_ids_stand_in_place_of_a_prompt(tiny: Path, model: Model):
    ids = model.encode("hello there")
    told = answer(tiny, "--ids", ",".join(map(str, ids)), "--max-tokens", 3, *F32)
    assert told["prompt_ids"] == ids
    assert told["ids"] == answer(tiny, "-p", "hello there", "--max-tokens", 3, *F32)["ids"]
    for asked, said in {
        ("--ids", "1,x"): "token ids, with commas between them",
        ("--ids", "1", "-p", "a"): "ask with one of the two",
        (): "ask with one of the two",
        ("--ids", "1", "--chat"): "--ids is without --chat",
        ("--ids", "999999"): "is not in the vocabulary",
    }.items():
        refused = call_command("run", tiny, *asked)
        assert (refused.code, refused.out) == (2, "")
        assert said in refused.err


def test_an_answer_of_one_token_has_no_speed(tiny: Path):
    told = call_command("run", tiny, "-p", "hello", "--max-tokens", 1, *F32).err
    assert "; answer 1 token\n" in told
