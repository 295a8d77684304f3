"""Failures that a backend knows of: what their file may say, and what comes of a run's outcomes."""

from dataclasses import replace

import pytest

from kernelmux.conformance import Outcome
from kernelmux.conformance.known import KEYS, Known, KnownFailures, apply_known, read_known
from kernelmux.errors import BackendError

FAILED = Outcome("mul-a", "mul", "mine:kernel", "", "fail", failures=("error: off",))
PASSED = replace(FAILED, case="mul-b", status="pass", failures=())
WHOLE = {"case": "mul-a", "kernel": "mine:kernel", "reason": "rounds down", "link": "https://example.org/1"}


def entry(case, **changed):
    return Known(**{**WHOLE, "case": case, **changed})


def test_a_known_failure_is_known_with_its_reason_and_link():
    (outcome,) = apply_known([FAILED], KnownFailures(failure=[entry("mul-a")]))
    assert (outcome.status, outcome.reason) == ("known", "rounds down (https://example.org/1)")


@pytest.mark.parametrize(("case", "why"), [("mul-b", "passes now"), ("mul-c", "is no case of this kernel")])
def test_a_stale_entry_fails(case, why):
    *rest, stale = apply_known([FAILED, PASSED], KnownFailures(failure=[entry(case)]))
    assert rest == [FAILED, PASSED]
    assert (stale.status, stale.failures) == ("fail", (f"stale: known_failures.toml names {case}, which {why}",))


def test_a_pattern_is_not_stale_while_one_of_its_cases_fails():
    outcomes = apply_known([FAILED, PASSED], KnownFailures(failure=[entry("mul-*")]))
    assert [outcome.status for outcome in outcomes] == ["known", "pass"]


def test_of_entries_that_overlap_each_counts_as_met():
    outcomes = apply_known([FAILED, PASSED], KnownFailures(failure=[entry("mul-*"), entry("mul-a", reason="again")]))
    assert [outcome.status for outcome in outcomes] == ["known", "pass"]
    assert outcomes[0].reason.startswith("rounds down")


def test_an_entry_for_another_kernel_is_stale_here():
    outcomes = apply_known([FAILED], KnownFailures(failure=[entry("mul-a", kernel="mine:other")]))
    assert [outcome.status for outcome in outcomes] == ["fail", "fail"]


def table(**changed):
    keys = {**{key: repr(value) for key, value in WHOLE.items()}, **changed}
    return "[[failure]]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items() if value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "known_failures.toml"


def test_the_entries_of_a_file_are_read_in_order_and_an_empty_one_knows_of_none(path):
    path.write_text(table() + table(case="'mul-*'"))
    assert [entry.case for entry in read_known(path).failure] == ["mul-a", "mul-*"]
    path.write_text("")
    assert read_known(path).failure == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[failure]]\ncase = 'mul-a'\n", "failure 1, kernel: field required"),
        (table() + table(case="3"), "failure 2, case: input should be a valid string"),
        (table(case="['mul-a']"), "failure 1, case: input should be a valid string"),
        (table(reason="''"), "failure 1, reason: string should have at least 1 character"),
        (table(kernel="'mine:*'"), "failure 1, kernel: string should match pattern"),
        (table(kernel="'kernel'"), "failure 1, kernel: string should match pattern"),
        (table(typo="'x'"), "failure 1, typo: extra inputs are not permitted"),
        (table().replace("failure", "failures"), "failures: extra inputs are not permitted"),
        (table().replace("[[failure]]", "[failure]"), "failure: input should be a valid list"),
        ("failure = 3\n", "failure: input should be a valid list"),
        ("[[failure\n", "no TOML in UTF-8: "),
    ],
)
def test_a_file_that_is_none_is_an_error_that_says_where(path, text, said):
    path.write_text(text)
    with pytest.raises(BackendError) as caught:
        read_known(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert ("TOML" in said) or str(caught.value).endswith(f"; {KEYS}")


def test_the_command_of_a_stale_entry_reads_the_file(path):
    path.write_text(table())
    (stale,) = apply_known([], read_known(path))
    assert stale.command == f"kernelmux check --backend mine --known {path}"
