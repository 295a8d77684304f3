"""`check --fuzz`: random cases, what fails made small, and a file and a command that show it again."""

import json
import shlex

import pytest
import torch

from command import assert_one_line_error, call_command
from fake_backend import FakeKernel, compute
from kernelmux.conformance import Filter
from kernelmux.conformance.case_file import read_cases
from kernelmux.conformance.fuzz import fuzz
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.errors import BackendError
from kernelmux.graph.ops import CORE_OPS


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Where `fuzz-SEED.json` goes unless told."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wrong_where(where, **declared):
    """Results half as large again where `where(node)` holds."""

    def work(node, tensors):
        compute(node, tensors)
        if where(node):
            tensors.outputs[0].mul_(1.5)

    return FakeKernel(takes=["f32"], emits=["f32"], work=work, **declared)


def check(*arguments, **backends):
    with registry.isolated(**backends):
        return call_command("check", *arguments)


def columns(node):
    return node.inputs[0].extents[1]


def test_a_right_backend_passes_and_leaves_no_file(place):
    result = check("--fuzz", 20, "--seed", 3, fake=backend(silu=FakeKernel(work=compute), mul=FakeKernel(work=compute)))
    assert (result.code, result.err) == (0, "")
    assert "40 pass, 0 refused, 0 fail" in result.out
    assert list(place.iterdir()) == []


def test_a_failure_is_as_small_as_it_fails_and_its_file_and_command_show_it_again(place):
    fake = backend(silu=wrong_where(lambda node: node.rows >= 3 and columns(node) > 100))
    result = check("--fuzz", 60, "--op", "silu", "--seed", 7, fake=fake)
    assert result.code == 1
    case, *_ = read_cases("fuzz-7.json").cases
    assert case.inputs[0].extents == (3, 101)
    assert case.name == "silu-drawn:m=3,n=101"
    assert json.dumps(case.name) in result.err
    assert "1 failing case, made small, and it as it was drawn: fuzz-7.json" in result.err
    (again,) = (line.partition("again: ")[2] for line in result.out.splitlines() if "again: " in line)
    program, command, *words = shlex.split(again)
    assert (program, command) == ("kernelmux", "check")
    repeated = check(*words, fake=fake)
    assert repeated.code == 1
    assert "silu-drawn:m=3,n=101" in repeated.out
    mended = check(*words, fake=backend(silu=FakeKernel(work=compute)))
    assert mended.code == 0


def test_choices_become_plain_unless_the_failure_needs_them():
    def where(node):
        return node.rotation.scaling == "yarn" and node.rotation.dims < node.head_dim

    with registry.isolated(fake=backend(rope=wrong_where(where))) as current:
        found = [*fuzz("fake", current, 120, 1, wanted=Filter(op="rope"))]
    failed = [one for one in found if one.outcome.status == "fail" and not one.alike]
    assert [one.case.name for one in failed] == ["rope-drawn:m=1,first=0,part=0.5,scaling=yarn"]


def test_of_several_failures_of_a_kernel_and_check_one_is_told_and_the_others_are_counted():
    fake = backend(silu=wrong_where(lambda node: True))
    with registry.isolated(fake=fake) as current:
        found = list(fuzz("fake", current, 30, 0))
    failed = [one for one in found if one.outcome.status == "fail"]
    # Where all is zero half as much again is right.
    assert 20 < len(failed) < len(found) == 30
    assert [one.alike for one in failed] == [False] + [True] * (len(failed) - 1)
    result = check("--fuzz", 30, "--op", "silu", fake=fake)
    assert f"{30 - len(failed)} pass, 0 refused, {len(failed)} fail" in result.out
    assert f"alike: {len(failed) - 1} more of the random cases of silu failed so" in result.out
    assert f"{len(failed)} failed: the first of each kernel run again" in result.err
    assert result.out.count("again: ") == 1


def test_kernels_that_raise_elsewhere_are_not_alike(place):
    def raises(node, tensors):
        if columns(node) % 2:
            raise ValueError("odd\x1b[2J\nand wide")
        if columns(node) > 64:
            raise IndexError("too wide")
        compute(node, tensors)

    result = check("--fuzz", 40, "--op", "mul", "--json", fake=backend(mul=FakeKernel(work=raises)))
    failed = [one for one in json.loads(result.out)["outcomes"] if one["status"] == "fail"]
    assert sorted(one["failures"][0].partition(" (")[0] for one in failed) == [
        "raises: IndexError: too wide",
        "raises: ValueError: odd\\x1b[2J and wide",
    ]
    assert {one["raised"].partition(",")[0] for one in failed} == {"IndexError", "ValueError"}


def test_the_command_of_any_random_case_ends_with_it():
    fake = backend(silu=FakeKernel(work=compute), mul=FakeKernel(work=compute))
    one = json.loads(check("--fuzz", 9, "--seed", 4, "--json", fake=fake).out)["outcomes"][4]
    words = shlex.split(one["command"])[2:]
    assert words == ["--kernel", "fake:f32", "--op", one["op"], "--fuzz", "9", "--seed", "4", "--until", one["case"]]
    found = json.loads(check(*words, "--json", fake=fake).out)["outcomes"]
    assert [each["op"] for each in found] == [one["op"]] * 5
    assert found[-1] == one


def test_up_to_a_case_nothing_is_made_smaller_grouped_or_written(place):
    fake = backend(silu=wrong_where(lambda node: True))
    with registry.isolated(fake=fake) as current:
        whole = list(fuzz("fake", current, 9, 0))
    last = whole[6].case.name
    result = check("--backend", "fake", "--fuzz", 9, "--until", last, "--json", fake=fake)
    found = json.loads(result.out)["outcomes"]
    assert [one["status"] for one in found] == [one.outcome.status for one in whole[:7]]
    assert found[-1]["command"] == f"kernelmux check --backend fake --fuzz 9 --seed 0 --until {last}"
    assert result.code == 1
    assert list(place.iterdir()) == []


def test_a_name_that_no_random_case_has_is_one_line():
    fake = backend(silu=FakeKernel(work=compute))
    told = "of so many random cases of seed 0 none is called 'silu-drawn:m=3,n=1010101'"
    assert_one_line_error(check("--fuzz", 5, "--until", "silu-drawn:m=3,n=1010101", fake=fake), told)


def test_a_file_of_an_earlier_run_is_told_where_nothing_failed(place):
    check("--fuzz", 9, "--op", "silu", fake=backend(silu=wrong_where(lambda node: True)))
    result = check("--fuzz", 9, "--op", "silu", fake=backend(silu=FakeKernel(work=compute)))
    assert (result.code, result.err) == (0, "nothing failed: fuzz-0.json is of an earlier run\n")
    assert read_cases("fuzz-0.json").cases


def test_ctrl_c_while_a_failure_is_made_smaller_loses_nothing_of_it(place):
    made = []

    def work(node, tensors):
        made.append(node.inputs[0].extents)
        if len(made) > 20 and node.rows >= 3:
            raise KeyboardInterrupt
        compute(node, tensors)
        if node.rows >= 3:
            tensors.outputs[0].mul_(1.5)

    result = check("--fuzz", 60, "--op", "silu", "--save", "r.json", fake=backend(silu=FakeKernel(work=work)))
    assert result.code == 130
    case, *_ = read_cases("fuzz-0.json").cases
    assert case.inputs[0].extents in made
    assert "1 fail" in result.out
    assert json.loads((place / "r.json").read_text())["totals"]["fail"] == 1


def test_the_same_seed_has_the_same_cases_and_another_has_others():
    with registry.isolated(fake=backend(add=FakeKernel(work=compute))) as current:
        runs = [
            [one.case.name for one in fuzz("fake", current, count, seed)] for count, seed in ((9, 1), (20, 1), (9, 2))
        ]
    assert runs[1][:9] == runs[0]
    assert runs[2] != runs[0]


def test_a_kernel_that_raises_is_made_small_too(place):
    def raises(node, tensors):
        if columns(node) > 64:
            raise ValueError("too wide")
        compute(node, tensors)

    result = check("--fuzz", 40, "--op", "mul", "--fuzz-cases", "wide.json", fake=backend(mul=FakeKernel(work=raises)))
    assert result.code == 1
    assert "raises: ValueError: too wide" in result.out
    case, *_ = read_cases(place / "wide.json").cases
    assert case.inputs[0].extents == (1, 65)


def test_what_a_kernel_refuses_is_not_run():
    def few(node, m):
        return FakeKernel(work=compute) if m <= 8 else Declined("eight rows", kernel="f32")

    with registry.isolated(fake=backend(silu=few)) as current:
        assert all(one.case.inputs[0].extents[0] <= 8 for one in fuzz("fake", current, 40, 0))


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["--fuzz", 5, "--backend", "fakr"], ["unknown backend 'fakr'", "did you mean 'fake'?"]),
        (["--fuzz", 5, "--op", "silo"], ["unknown op 'silo'", "did you mean 'silu'?"]),
        (["--fuzz", 5, "--op", "rope"], ["takes none of these cases"]),
        (["--fuzz", 5, "--kernel", "f32"], ["backend:kernel"]),
        (["--fuzz", 5, "--kernel", "fake:f33"], ["takes none of these cases"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, hints):
    assert_one_line_error(check(*arguments, fake=backend(silu=FakeKernel(work=compute))), *hints)


@pytest.mark.parametrize("option", [["--smoke"], ["--case", "silu-*"], ["--list"], ["--large"]], ids=str)
def test_what_has_no_use_beside_it_is_refused(option):
    result = check("--fuzz", 5, *option, fake=backend(silu=FakeKernel(work=compute)))
    assert result.code == 2
    assert f"--fuzz is without {option[0]}" in result.err


def test_a_place_that_cannot_be_written_is_one_line():
    fake = backend(silu=wrong_where(lambda node: True))
    result = check("--fuzz", 5, "--op", "silu", "--fuzz-cases", "no/such/f.json", fake=fake)
    assert_one_line_error(result, "there is no folder no/such to write f.json to")


def test_a_backend_that_breaks_while_it_is_asked_is_an_error():
    with (
        registry.isolated(fake=backend(silu=lambda node, m: 1 / 0)) as current,
        pytest.raises(BackendError, match="broke while it was asked: ZeroDivisionError"),
    ):
        list(fuzz("fake", current, 5, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("op", sorted(CORE_OPS))
def test_300_random_cases_of_an_op_pass(op, name):
    """The whole of `check --fuzz 300 --seed 18`, an op a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = list(fuzz(name, registry.current(), 300, 18, wanted=Filter(op=op)))
    except BackendError as error:
        pytest.skip(str(error))
    finally:
        torch.set_num_threads(threads)
    assert not [(one.outcome.command, one.outcome.failures) for one in found if one.outcome.status == "fail"]


def test_extents_are_halved_down_to_where_the_failure_begins(place):
    fake = backend(silu=wrong_where(lambda node: node.rows % 2 == 1 and node.rows > 1 and columns(node) > 1024))
    assert check("--fuzz", 80, "--op", "silu", fake=fake).code == 1
    case, *_ = read_cases("fuzz-0.json").cases
    assert case.name == "silu-drawn:m=3,n=1025"


def test_a_file_that_holds_no_cases_is_kept(place):
    (place / "notes.txt").write_text("mine", "utf-8")
    result = check(
        "--fuzz", 2, "--op", "silu", "--fuzz-cases", "notes.txt", fake=backend(silu=FakeKernel(work=compute))
    )
    assert_one_line_error(result, "notes.txt is there, and is no file of cases: name another by --fuzz-cases")
    assert (place / "notes.txt").read_text("utf-8") == "mine"


def test_what_was_found_before_ctrl_c_is_kept(place):
    def work(node, tensors):
        if columns(node) > 5000:
            raise KeyboardInterrupt
        compute(node, tensors)
        tensors.outputs[0].mul_(1.5)

    fake = backend(silu=FakeKernel(takes=["f32"], emits=["f32"], work=work))
    result = check("--fuzz", 300, "--op", "silu", "--save", "report.json", fake=fake)
    assert result.code == 130
    assert "interrupted after" in result.err
    assert json.loads((place / "report.json").read_text("utf-8"))["notes"][-1] in result.err
    assert "fail, 0 known" in result.out
    assert read_cases("fuzz-0.json").cases
