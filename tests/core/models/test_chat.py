"""Chat templates: what they may rely on, and how one that fails says so."""

import re
from datetime import datetime

import pytest

from kernelmux.errors import ModelError
from kernelmux.models.chat import render_chat
from tiny_model import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def render(template, messages=MESSAGES, **options):
    return render_chat(template, messages, bos_token="<s>", eos_token="</s>", **options)


def test_a_chat_ends_with_the_opening_of_the_answer_unless_told():
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert render(CHAT_TEMPLATE) == f"{chat}<|im_start|>assistant\n"
    assert render(CHAT_TEMPLATE, add_generation_prompt=False) == chat


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hi</s>"),
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% for m in messages[1:] %}{{ m['content'] | trim }}{% endfor %}", "Hello"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ tools is defined }}", "False"),
    ],
    ids=["tokens", "trimmed blocks", "loop controls", "slices", "namespaces", "absent variables"],
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
    ],
    ids=["refusal", "syntax", "undefined", "index", "arithmetic", "escape", "mutation", "include", "filter"],
)
def test_a_template_that_fails_says_why_in_one_line(template, message):
    with pytest.raises(ModelError, match=f"^chat template.*{message}") as caught:
        render(template)
    assert "\n" not in str(caught.value)
    said = re.search(r", line (\d+): ", str(caught.value))
    assert caught.value.line == (int(said[1]) if said else None)


def test_messages_stay_as_they_are():
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ModelError, match="SecurityError"):
        render("{{ messages[0].update(role='system') }}", messages)
    assert messages == [{"role": "user", "content": "Hi"}]
