"""A conversation: the cache is kept while messages go on from it, and what does not fit is left out or refused."""

import pytest

import kernelmux
from kernelmux.errors import ModelError
from kernelmux.run.chat import Chat
from kernelmux.run.model import PromptOptions
from kernelmux.run.sampling import Sampling
from tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def model(tiny):
    return kernelmux.load(tiny)


@pytest.fixture(scope="module")
def plan(model):
    return model.plan(use=["*=torch:f32,torch:sdpa,torch:rows"])


@pytest.fixture
def scripted(model, monkeypatch):
    """Has models say given texts: what is drawn next is the next of their ids, whatever the logits are."""
    ids = []

    def say(*texts):
        ids.clear()
        for text in texts:
            ids.extend(model.source.tokenizer.encode(text, parse_special=True))

    monkeypatch.setattr("kernelmux.run.generate.draw_next", lambda sampler, logits: ids.pop(0))
    decode = kernelmux.run.session.Session.decode

    def decoded(self, sequences, tokens, steps, sampling):
        for step in decode(self, sequences, tokens, steps, sampling):
            yield [ids.pop(0)] if ids else step

    monkeypatch.setattr("kernelmux.run.session.Session.decode", decoded)
    return say


def test_the_first_answer_is_that_of_a_single_question(model, plan):
    answer = "".join(Chat(model, plan, Sampling(), 64, 8).ask("hello"))
    assert answer == "".join(model.generate([{"role": "user", "content": "hello"}], plan, max_tokens=8))


def test_the_second_question_reads_only_what_is_new(model, plan, scripted):
    chat = Chat(model, plan, Sampling(), 128, 8)
    scripted("hey<|im_end|>")
    assert "".join(chat.ask("hello")) == "hey"
    assert (chat.kept, chat.cut) == (0, False)
    first = len(model.encode(chat.messages[:1])) + len(model.source.tokenizer.encode("hey"))
    scripted("yes<|im_end|>")
    assert "".join(chat.ask("there?")) == "yes"
    assert chat.kept == first
    said = [(message["role"], message["content"]) for message in chat.messages]
    assert said == [("user", "hello"), ("assistant", "hey"), ("user", "there?"), ("assistant", "yes")]


def test_a_kept_cache_gives_the_logits_of_all_that_was_said(model, plan):
    """Where answers are text, so that what was drawn is what is rendered again."""
    kept = Chat(model, plan, Sampling(), 256, 8)
    for question in ("a", "b", "c"):
        answer = "".join(kept.ask(question))
        anew = "".join(model.generate(kept.messages[:-1], plan, max_tokens=8))
        assert answer == anew


def test_what_a_user_writes_is_no_control_token_and_the_cache_is_kept_over_it(model, plan, scripted):
    (end,) = model.source.tokenizer.encode("<|im_end|>", add_special=False, parse_special=True)
    chat = Chat(model, plan, Sampling(), 256, 8)
    fed = []
    read = chat.session.feed
    chat.session.feed = lambda sequence, ids: fed.append(ids) or read(sequence, ids)
    for question in ("a<|im_end|>b", "c<|im_end|>", "d"):
        scripted("hey<|im_end|>")
        assert "".join(chat.ask(question)) == "hey"
    assert [ids.count(end) for ids in fed] == [1, 2, 2], "the template's own, of the answer before and of the question"
    assert chat.kept > 0


def test_options_reach_the_template(model, plan, scripted):
    options = PromptOptions(chat_template="{{ tools | tojson }}{{ messages[-1].content }}", tools=[{"name": "f"}])
    chat = Chat(model, plan, Sampling(), 128, 8, options=options)
    fed = []
    read = chat.session.feed
    chat.session.feed = lambda sequence, ids: fed.append(ids) or read(sequence, ids)
    scripted("hey<|im_end|>")
    list(chat.ask("hello"))
    assert model.source.tokenizer.decode(fed[0]) == '[{"name": "f"}]hello'


def test_an_answer_left_early_is_part_of_the_chat_as_far_as_it_came(model, plan, scripted):
    chat = Chat(model, plan, Sampling(), 128, 8)
    scripted("abcdefgh")
    answer = chat.ask("hello")
    assert next(answer) + next(answer) == "ab"
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "ab"}
    scripted("so<|im_end|>")
    assert "".join(chat.ask("go on")) == "so"
    assert chat.kept > 0


def test_a_template_that_rewrites_what_was_said_is_read_anew(tmp_path, scripted):
    template = "{% for m in messages %}[{{ loop.revindex }}{{ m.role }}:{{ m.content }}]{% endfor %}"
    other = kernelmux.load(write_tiny_llama(tmp_path / "m.gguf", extra={"tokenizer.chat_template": template}))
    chat = Chat(other, other.plan(), Sampling(), 128, 4)
    for question in "ab":
        scripted("x<|im_end|>")
        assert "".join(chat.ask(question)) == "x"
        assert chat.kept == 0


def test_where_the_cache_is_full_the_oldest_messages_are_left_out_and_the_system_message_stays(model, plan, scripted):
    chat = Chat(model, plan, Sampling(), 64, 4, system="sys")
    dropped = 0
    for _ in range(4):
        scripted("ok<|im_end|>")
        assert "".join(chat.ask("0123456789")) == "ok"
        dropped += chat.dropped
    assert dropped > 0
    assert chat.messages[0] == {"role": "system", "content": "sys"}
    assert chat.messages[1]["role"] == "user"


def test_a_message_that_does_not_fit_is_refused_and_the_chat_goes_on(model, plan, scripted):
    chat = Chat(model, plan, Sampling(), 64, 4)
    with pytest.raises(ModelError, match=r"the message makes \d+ tokens, the chat holds 64"):
        next(chat.ask("x" * 100))
    scripted("ok<|im_end|>")
    assert "".join(chat.ask("hello")) == "ok"
    assert len(chat.messages) == 2


def test_an_answer_that_ends_for_want_of_tokens_says_so(model, plan, scripted):
    chat = Chat(model, plan, Sampling(), 128, 2)
    scripted("abc")
    assert "".join(chat.ask("hello")) == "ab"
    assert chat.cut


def test_a_model_without_a_template_is_refused_at_once(tmp_path):
    mute = kernelmux.load(write_tiny_llama(tmp_path / "m.gguf", extra={"tokenizer.chat_template": None}))
    with pytest.raises(ModelError, match="no chat template"):
        Chat(mute, mute.plan(), Sampling(), 64, 4)
