"""The page of a folder: every document that commands save has its part, and nothing in it is taken as HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from command import call_command
from kernelmux.debug.page import report_page
from kernelmux.errors import KernelmuxError

LIMIT = 2 << 20
"""Bytes of a page."""


class Page(HTMLParser):
    """A page's headings, text, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "h2" in self.open:
            self.headings[-1] += data


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands save of a tiny model."""
    folder = tmp_path_factory.mktemp("saved")
    text = folder / "text.txt"
    text.write_text("A small text, of two sentences. This is the second.")
    rough = "*=torch:f32,torch:sdpa,torch:rows;mul_mat=torch:bf16"
    done = [
        call_command("check", "--kernel", "torch:f32", "--op", "silu", "--smoke", "--save", folder / "check.json"),
        call_command("compare", tiny, "exact", rough, "--text", text, "--nodes", 9, "--save", folder / "compare.json"),
        call_command("bisect", tiny, "--use", "*=torch", "--ids", "1,2,3", "--save", folder / "bisect.json"),
        call_command(
            "bench", "model", tiny, "--prompt", 8, "--decode", 2, "--context", 8, "--save", folder / "bench.json"
        ),
        call_command("trace", tiny, "--prompt", 8, "--decode", 2, "--json"),
        call_command("plan", tiny, "--json"),
    ]
    assert [each.code for each in done] == [0] * 6, [each.err for each in done]
    for name, made in zip(("trace", "plan"), done[-2:], strict=True):
        (folder / f"{name}.json").write_text(made.out)
    return folder


def test_every_document_has_its_part(saved: Path):
    text = report_page(saved)
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert len(text) < LIMIT
    assert [heading.rsplit(" ", 1)[-1] for heading in page.headings] == [
        "bench.json",
        "bisect.json",
        "check.json",
        "compare.json",
        "plan.json",
        "trace.json",
        "trace.json",
    ]
    for said in (
        "Nothing is wrong",
        "Conformance of torch",
        "held against exact",
        "Choice at 1 rows",
        "nats a token",
        "a better kernel",
    ):
        assert said in page.text


def test_it_is_made_by_the_command(saved: Path, tmp_path: Path):
    done = call_command("report", saved, "-o", tmp_path / "page.html")
    assert (done.code, done.out) == (0, f"{tmp_path / 'page.html'}: written\n")
    assert (tmp_path / "page.html").read_text("utf-8") == report_page(saved)


def test_a_document_is_not_written_over(saved: Path):
    before = (saved / "plan.json").read_bytes()
    done = call_command("report", saved, "-o", saved / "plan.json")
    assert done.code == 2
    assert "name another file" in done.err
    assert (saved / "plan.json").read_bytes() == before


def test_text_is_no_markup_and_what_is_unknown_is_named(tmp_path: Path):
    evil = "<script>alert(1)</script>"
    rows = [{"work": evil, "median": 2.0}, {"work": "b", "median": 1.0}]
    (tmp_path / "a.json").write_text(json.dumps({"title": evil, "rows": rows, "notes": [evil]}))
    (tmp_path / "odd.json").write_text('{"what": 1}')
    (tmp_path / "broken.json").write_text("{")
    text = report_page(tmp_path)
    assert "<script" not in text
    assert "Left out, for nothing here is made of such: broken.json, odd.json." in Page(text).text


@pytest.mark.parametrize("make", [lambda path: path.rmdir(), lambda path: None, lambda path: (path / "a.json").touch()])
def test_a_folder_without_documents_is_one_line(tmp_path: Path, make):
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    with pytest.raises(KernelmuxError, match=r"no such folder|no document that a page can be made of"):
        report_page(folder)
    assert call_command("report", folder).code == 2


def test_a_long_table_ends_with_how_much_is_left_out(tmp_path: Path):
    rows = [{"op": f"op {number}", "us": number} for number in range(100)]
    (tmp_path / "a.json").write_text(json.dumps({"title": "Times", "rows": rows}))
    text = Page(report_page(tmp_path)).text
    assert "and 60 more rows in a.json" in text
    assert "op 39" in text
    assert "op 41" not in text
