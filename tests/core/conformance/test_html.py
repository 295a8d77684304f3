"""The HTML page: complete in itself, every text escaped, every link within it leads somewhere."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from kernelmux.conformance import Outcome
from kernelmux.conformance.html import to_html
from kernelmux.conformance.report import Report

VOID = {"meta", "br", "link", "img", "input"}
OK = Outcome("silu-a", "silu", "x:f32", "", "pass", error=1e-12, worst=1e-6, bound=1e-10, batch_invariant=True)
WRONG = replace(OK, case="silu-b", status="fail", failures=("error: NMSE 1 is over", "guards: overwritten"), error=1.0)
RAISES = Outcome("mul_mat-c", "mul_mat", "y:f32", "Q4_0", "fail", failures=("raises: IndexError",))
REFUSED = Outcome("mul_mat-d", "mul_mat", "y:int4", "f32", "refused", reason="it takes <weights> in Q4_0")
KNOWN = replace(WRONG, case="silu-e", status="known", reason="rounds down (https://example.org/1)")
STALE = Outcome("rope-*", "", "x:f32", "", "fail", failures=("stale: known_failures.toml names rope-*",))
EVERYTHING = (OK, WRONG, RAISES, REFUSED, KNOWN, STALE)


class Page(HTMLParser):
    """Tags with their attributes, and the text; AssertionError where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, attribute):
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


def page_of(*outcomes, notes=()):
    versions = {"kernelmux": "1.2", "backend x": "3.4"}
    return to_html(Report(outcomes, "cuda NVIDIA H100 sm_90", versions, "2026-01-01 00:00 UTC", notes))


@pytest.mark.parametrize("outcomes", [EVERYTHING, (OK,), (REFUSED,), (KNOWN, OK), ()], ids=len)
def test_the_page_is_sound_and_loads_nothing(outcomes):
    text = page_of(*outcomes)
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"} == set()
    assert page.all("src") == []
    assert "@import" not in text
    assert "url(" not in text
    assert all(target.startswith("#") for target in page.all("href"))


def test_every_link_leads_to_one_place_on_the_page():
    page = Page(page_of(*EVERYTHING))
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.all("href")} <= set(ids)


def test_names_and_reasons_are_text_whatever_they_hold():
    hostile = "<script>alert('x')</script>&\""
    named = [replace(outcome, case=hostile, reason=hostile, failures=(f"error: {hostile}",)) for outcome in EVERYTHING]
    named.append(replace(OK, op=hostile, kernel=f"{hostile}:f32", weight_format=hostile))
    text = page_of(*named, notes=(hostile,))
    assert "<script" not in text
    assert hostile in Page(text).text


def test_failures_come_first_each_with_its_checks_numbers_and_command():
    text = Page(page_of(*EVERYTHING)).text
    for expected in (
        "guards: overwritten",
        "raises: IndexError",
        WRONG.command,
        RAISES.command,
        "NMSE 1 against 1e-10",
    ):
        assert text.index(expected) < text.index("Cases by op, weight format and kernel")


def test_every_cell_says_by_sign_what_its_colour_says():
    text = " ".join(Page(page_of(*EVERYTHING)).text.split())
    for sign in ("✗\N{NO-BREAK SPACE}1", "!\N{NO-BREAK SPACE}1", "✓\N{NO-BREAK SPACE}1", "–\N{NO-BREAK SPACE}1"):
        assert " ".join(sign.split()) in text


def test_the_head_says_what_was_checked_with_which_versions_on_what():
    text = Page(page_of(*EVERYTHING, notes=("triton takes no case on cpu",))).text
    for expected in ("Conformance of x, y", "1.2", "3.4", "cuda NVIDIA H100 sm_90", "triton takes no case on cpu"):
        assert expected in text


def test_refusals_are_grouped_by_their_reason():
    text = Page(page_of(REFUSED, replace(REFUSED, case="mul_mat-f", kernel="y:int8"), OK)).text
    after = text[text.index("Refusals", text.index("Cases by op")) :]
    assert "y:int4, y:int8" in after


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ((OK, REFUSED), "Of 1 cases that the kernels take, all passed."),
        ((OK, WRONG), "Of 2 cases that the kernels take, 1 failed."),
        ((REFUSED,), "The kernels take none of the cases."),
        ((OK, KNOWN), "all passed but 1, which failed as known."),
    ],
)
def test_one_sentence_says_how_it_went(outcomes, verdict):
    assert verdict in " ".join(Page(page_of(*outcomes)).text.split())
