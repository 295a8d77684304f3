"""Chat templates: what they may rely on, what they may take, and how one that fails says so."""

import os
import re
import threading
import time
from datetime import datetime

import pytest

from conversations import CONVERSATIONS, TEMPLATES
from kernelmux.errors import ModelError
from kernelmux.models import chat
from kernelmux.models.chat import ChatTemplate, stated_template
from kernelmux.models.tokenizer import Tokenizer
from tiny_model import CHAT_TEMPLATE
from vocabularies import piece_vocabulary

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOKENIZER = Tokenizer.from_metadata(piece_vocabulary(), "pieces")


def render(template, messages=MESSAGES, **options):
    text, mark = ChatTemplate(template, TOKENIZER).render(messages, **options)
    assert not mark
    return text


def test_a_chat_ends_with_the_opening_of_the_answer_unless_told():
    said = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert render(CHAT_TEMPLATE) == f"{said}<|im_start|>assistant\n"
    assert render(CHAT_TEMPLATE, add_generation_prompt=False) == said


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_are_rendered_as_transformers_does(template, conversation):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    asked = {"add_generation_prompt": True, **CONVERSATIONS[conversation]}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    messages = utilities._normalize_chat_messages(asked["messages"])
    options = {key: value for key, value in asked.items() if key != "messages"}
    theirs, _ = utilities.render_jinja_template([messages], chat_template=TEMPLATES[template], **options, **tokens)
    assert render(TEMPLATES[template], **asked) == theirs[0]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hi</s>"),
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% for m in messages[1:] %}{{ m['content'] | trim }}{% endfor %}", "Hello"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{% generation %}said{% endgeneration %}!", "said!"),
    ],
    ids=["tokens", "trimmed blocks", "loop controls", "slices", "namespaces", "no tools", "json", "generation"],
)
def test_what_templates_rely_on(template, text):
    assert render(template) == text


def test_the_date():
    before = datetime.now().strftime("%Y-%m-%d")
    assert render("{{ strftime_now('%Y-%m-%d') }}") in (before, datetime.now().strftime("%Y-%m-%d"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("ok\n{{ raise_exception('roles must\nalternate') }}", "line 2: refuses these messages: roles must alternate"),
        ("a\nb{% if %}", "line 2: TemplateSyntaxError: "),
        ("a\n\n{{ messages[0].name.first }}", "line 3: UndefinedError: .*name"),
        ("{{ messages[5]['role'] }}", "line 1: UndefinedError: "),
        ("{{ 1 / 0 }}", "line 1: ZeroDivisionError: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "line 1: SecurityError: "),
        ("{{ messages.append(1) }}", "line 1: SecurityError: "),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("{{ messages | nosuch }}", "line 1: TemplateAssertionError: .*nosuch"),
        ("{% generation %}", "line 1: TemplateSyntaxError: "),
    ],
    ids=["refusal", "syntax", "undefined", "index", "arithmetic", "escape", "mutation", "include", "filter", "open"],
)
def test_a_template_that_fails_says_why_in_one_line(template, message):
    with pytest.raises(ModelError, match=f"^chat template.*{message}") as caught:
        render(template)
    assert "\n" not in str(caught.value)
    said = re.search(r", line (\d+): ", str(caught.value))
    assert caught.value.line == (int(said[1]) if said else None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 10 ** (10 ** 10) }}", "takes more than 1 s of processor time"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1 s of"),
        ("{{ 'x' * 10 ** 9 }}", "takes more memory than it may"),
        ("{{ 'x'.center(10 ** 9) }}", "takes more memory than it may"),
        ("{{ '%999999999d' % 1 }}", "takes more memory than it may"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more text than it may"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}", "RecursionError"),
        ("x" * (1 << 20) + "x", "1048577 characters; up to 1048576 are read"),
    ],
    ids=["power", "loops", "repetition", "padding", "format", "text", "recursion", "nesting", "template"],
)
def test_what_a_template_takes_is_bounded(monkeypatch, template, message):
    monkeypatch.setattr(chat, "SECONDS", 1)
    with pytest.raises(ModelError, match=f"^chat template.*{message}"):
        render(template)


def test_after_a_failure_the_next_one_is_rendered(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    template = ChatTemplate(
        "{{ 'ok' if messages | length == 1 else 10 ** (10 ** (5 * messages | length)) }}", TOKENIZER
    )
    for _ in range(2):
        assert template.render(MESSAGES[:1])[0] == "ok"
        with pytest.raises(ModelError, match="processor time"):
            template.render(MESSAGES)


def test_a_process_that_does_not_answer_is_ended(monkeypatch):
    monkeypatch.setattr(chat, "PATIENCE", 0.05)
    monkeypatch.setattr(chat, "SECONDS", 60)
    started = time.monotonic()
    with pytest.raises(ModelError, match="its process ended"):
        render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    assert time.monotonic() - started < 20


def test_rendering_again_takes_milliseconds_and_one_process():
    template = ChatTemplate(CHAT_TEMPLATE, TOKENIZER)
    first = template.render(MESSAGES)
    process = template._renderer
    started = time.perf_counter()
    for _ in range(20):
        assert template.render(MESSAGES) == first
    assert (time.perf_counter() - started) / 20 < 0.1
    assert template._renderer is process


def test_threads_get_their_own_texts():
    template = ChatTemplate("{{ messages[0].content }}", TOKENIZER)
    wrong = []

    def ask(name):
        messages = [{"role": "user", "content": name}]
        wrong.extend(1 for _ in range(20) if template.render(messages)[0] != name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_process_ends_with_its_template():
    template = ChatTemplate(CHAT_TEMPLATE, TOKENIZER)
    template.render(MESSAGES)
    pid = template._renderer._process.pid
    del template
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_messages_stay_as_they_are():
    messages = [{"role": "user", "content": "Hi", "name": None}]
    with pytest.raises(ModelError, match="SecurityError"):
        render("{{ messages[0].update(role='system') }}", messages)
    assert messages == [{"role": "user", "content": "Hi", "name": None}]


@pytest.mark.parametrize("content", [object(), b"x", {1, 2}])
def test_messages_are_of_jsons_types(content):
    with pytest.raises(ModelError, match="messages, tools and documents are text, numbers, lists and dicts"):
        render(CHAT_TEMPLATE, [{"role": "user", "content": content}])


def test_the_template_that_a_file_states():
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert [stated_template({"tokenizer.chat_template": several}, tools) for tools in (False, True)] == ["a", "b"]
    named = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    assert [stated_template(named, tools) for tools in (False, True)] == ["a", "b"]
    assert stated_template({"tokenizer.chat_template": "a"}, True) == "a"
    assert stated_template({}, False) is None
    with pytest.raises(ModelError, match="template is '3', not text"):
        stated_template({"tokenizer.chat_template": 3}, False)
