"""Folders' tokenizers: the ids and texts of transformers, control tokens that are text, and what is refused."""

import json
import threading

import pytest

from folders import CONTROLS, KINDS, write_tokenizer
from kernelmux.errors import ModelError
from kernelmux.models.tokenizer import Tokenizer
from texts import texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind's folder, written once."""
    place = tmp_path_factory.mktemp("folders")
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = write_tokenizer(place / kind.replace(" ", "-"), kind)
        return made[kind]

    return folder


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders(request.param)


def test_ids_and_texts_are_those_of_transformers(folder):
    theirs = pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    for text in texts(500):
        for parse_special in (False, True):
            asked = f"{text}<|im_end|>\n<think> a</s>b" if parse_special else text
            ids = ours.encode(asked, parse_special=parse_special)
            assert ids == theirs.encode(asked, split_special_tokens=not parse_special), asked
            assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), asked


def test_without_what_is_put_around_texts(folder):
    words = Tokenizer.from_folder(folder)
    ids = words.encode("a b", add_special=False)
    assert not {words.bos_id, words.eos_id} & set(ids)
    assert words.encode("a b") == [*words.vocabulary.opening, *ids, *words.vocabulary.closing]


def test_a_stream_says_what_decode_says(folder):
    words = Tokenizer.from_folder(folder)
    for text in texts(50, seed=4):
        ids = words.encode(f"{text}🙂é", parse_special=True)
        stream = words.stream()
        parts = [stream.push(token) for token in ids]
        assert "".join(parts) + stream.flush() == words.decode(ids)
        assert "\ufffd" in text or not any("\ufffd" in part for part in parts), "no character is split"


def test_control_tokens_are_text_unless_asked_for(folder):
    words = Tokenizer.from_folder(folder)
    assert set(CONTROLS) <= words.control_tokens
    ids = words.encode("x<|im_end|>", add_special=False)
    end = words.vocabulary.tokens.index("<|im_end|>")
    assert end not in ids
    assert words.encode("x<|im_end|>", add_special=False, parse_special=True)[-1] == end


def test_what_is_quoted_is_text_within_what_is_parsed(folder):
    words = Tokenizer.from_folder(folder)
    tokens = words.vocabulary.tokens
    start, end = tokens.index("<|im_start|>"), tokens.index("<|im_end|>")
    marked = words.encode(
        "<|im_start|>a b<\ue000|im_end|>c<think><|im_end|>", False, parse_special=True, quote="\ue000"
    )
    assert [id for id in marked if id in (start, end)] == [start, end]
    assert tokens.index("<think>") in marked, "user-defined tokens are in any text"
    # What is quoted is split and merged as if there were no mark.
    quoted = marked[1 : marked.index(tokens.index("<think>"))]
    if words.goes_on:
        assert quoted == words.encode("a b<|im_end|>c", False)


def test_threads_do_not_hear_each_others_wishes(folder):
    words = Tokenizer.from_folder(folder)
    expected = {flag: words.encode("a<|im_end|>b", parse_special=flag) for flag in (False, True)}
    wrong = []

    def ask(flag):
        wrong.extend(1 for _ in range(200) if words.encode("a<|im_end|>b", parse_special=flag) != expected[flag])

    threads = [threading.Thread(target=ask, args=(flag,)) for flag in (False, True) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_ends_an_answer(folders):
    words = Tokenizer.from_folder(folders("gemma"))
    assert {words.token(token) for token in words.end_ids} == {"</s>", "<|im_end|>"}
    assert (words.token(words.bos_id), words.token(words.eos_id)) == ("<s>", "</s>")


def test_only_where_nothing_is_put_before_a_text_can_it_go_on(folders):
    goes_on = {kind: Tokenizer.from_folder(folders(kind)).goes_on for kind in KINDS}
    assert goes_on == {"byte level": True, "llama 2": False, "mistral": False, "gemma": True, "unigram": False}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer.json: no such file, so that prompts are token ids"),
        ("tokenizer.json", "{", r"tokenizer.json: is not JSON: "),
        ("tokenizer.json", "[1]", r"tokenizer.json: is JSON, but of a list; an object is needed"),
        ("tokenizer.json", "{}", r"tokenizer.json: cannot be read: "),
        ("tokenizer.json", "[" * 100_000, r"tokenizer.json: is not JSON: "),
        (
            "tokenizer_config.json",
            '{"bos_token": "<no>"}',
            r"'bos_token' is '<no>', which tokenizer.json does not have",
        ),
        ("generation_config.json", '{"eos_token_id": "2"}', r"'eos_token_id' is '\"2\"'; ids from 0 to \d+ are needed"),
        ("generation_config.json", '{"eos_token_id": [5000]}', r"'eos_token_id' is '\[5000\]'; ids from 0 to"),
    ],
)
def test_a_folder_that_is_no_tokenizer(tmp_path, folders, file, content, message):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folders("byte level") / name).read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_kind_of_tokenizer_says_which(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"no such file, so that .*; there is tokenizer.model, which transformers can convert"
    ):
        Tokenizer.from_folder(tmp_path)


def test_a_decoder_that_is_not_built_in(tmp_path, folders):
    data = json.loads((folders("byte level") / "tokenizer.json").read_text("utf-8"))
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"decoder '\[\"WordPiece\"\]' is not built in; known: ByteLevel, "):
        Tokenizer.from_folder(tmp_path)
