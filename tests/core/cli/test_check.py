"""`kernelmux check`: which cases it runs, what it says of them, and its exit codes."""

import importlib
import json
import shlex
import sys
import types
from dataclasses import replace
from threading import Event

import pytest

from command import assert_one_line_error, call_command
from fake_backend import FakeKernel, compute, silu_graph
from kernelmux.cli import progress
from kernelmux.conformance.case_file import write_cases
from kernelmux.conformance.testing import backend
from kernelmux.contract import CONTRACT, Declined, Kernel, hookimpl, registry
from kernelmux.contract.device import find_device
from kernelmux.contract.record import Record
from kernelmux.graph.formats import Value
from kernelmux.graph.ops import OPS, Case
from kernelmux.graph.ops.drawn import covering_cases
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import parse_policy
from wrong.elementwise import LeavesOutTheGate

DRAWN = 4
"""Of the cases that cover silu's domain, so many will do here."""
CASES = {case.name: case for case in (*OPS["silu"].cases(), *list(covering_cases(OPS["silu"]))[:DRAWN])}
CASES = {name: case for name, case in CASES.items() if case.inputs[0].extents[1] < 2000}
VARIANTS = ["silu-m5-n576@outputs0=f32", "silu-m5-n576@outputs0=f16"]
WRONG = [name for name, case in CASES.items() if case.inputs[0].extents[0] == 5 and "large" not in case.marks]
WRONG += VARIANTS


@pytest.fixture(autouse=True)
def few_cases(monkeypatch, request):
    """Of the suite's cases silu's, and what tests name of others: what is run is much the same for all."""
    if "all_of_the_suite" in request.fixturenames:
        return
    hookup = importlib.import_module("kernelmux.conformance.hookup")
    others = tuple(case for case in hookup.all_cases() if case.op == "convert")[:40]
    monkeypatch.setattr(hookup, "all_cases", lambda: (*CASES.values(), *others))


@pytest.fixture
def all_of_the_suite():
    """A test with this fixture has every case there is."""


def right():
    return FakeKernel(emits=["f32", "f16"], work=compute)


def wrong_for_five_rows():
    def work(node, tensors):
        compute(node, tensors)
        if node.outputs[0].extents[0] == 5:
            tensors.outputs[0].add_(1)

    return FakeKernel(emits=["f32", "f16"], work=work)


class Raising(FakeKernel):
    """Raises where it is launched, which is the line that messages are to name."""

    def bind(self, node, tensors, stream):
        def launch():
            raise OverflowError("too many rows")

        return launch


LINE = Raising.bind.__code__.co_firstlineno + 2


def check(*arguments, **backends):
    with registry.isolated(**backends):
        return call_command("check", *arguments)


def checked(*arguments, **backends):
    """The exit code, and the outcomes by case."""
    result = check("--json", *arguments, **backends)
    document = json.loads(result.out)
    return result.code, {outcome["case"]: outcome for outcome in document["outcomes"]}


def known_failures(path, *entries):
    tables = [f'[[failure]]\ncase = "{case}"\nkernel = "fake:f32"\nreason = "r"\nlink = "l"\n' for case in entries]
    path.write_text("\n".join(tables))
    return path


def test_a_right_backend_passes_with_exit_code_0():
    result = check(fake=backend(silu=right()))
    assert (result.code, result.err) == (0, "")
    last = result.out.splitlines()[-1]
    assert f" 0 refused, 0 fail, 0 known; on {find_device().device_class}, kernelmux " in last
    assert "backend fake" in last


def test_a_kernel_that_exits_has_failed_and_the_report_is_whole():
    def exits(node, tensors):
        raise SystemExit(0)

    result = check("--case", "silu-m5-n576", fake=backend(silu=FakeKernel(work=exits)))
    assert result.code == 1
    assert "  raises: SystemExit: 0 (fake_backend.py:" in result.out
    assert " 1 fail, 0 known" in result.out.splitlines()[-1]


def test_failures_are_exit_code_1_and_the_command_of_each_runs_that_case_alone():
    fake = backend(silu=wrong_for_five_rows())
    result = check(fake=fake)
    commands = [line.partition("again: ")[2] for line in result.out.splitlines() if "again: " in line]
    assert result.code == 1
    assert len(commands) == len(WRONG) > 0
    found = []
    for command in commands:
        program, subcommand, *arguments = shlex.split(command)
        assert (program, subcommand) == ("kernelmux", "check")
        code, outcomes = checked(*arguments, fake=fake)
        ((name, outcome),) = outcomes.items()
        assert code == 1
        assert outcome["failures"]
        found.append(name)
    assert sorted(found) == sorted(WRONG)


def test_a_variant_is_run_by_its_name():
    name = VARIANTS[-1]
    code, outcomes = checked("--case", name, fake=backend(silu=right()))
    assert (code, list(outcomes)) == (0, [name])
    assert outcomes[name]["bound"] > 1e-8


@pytest.mark.parametrize("name", ["silu[1]", "silu-*", "silu-?x"])
def test_a_name_means_itself_whatever_it_holds(name, monkeypatch):
    first, *others = CASES.values()
    cases = (replace(first, name=name), *others)
    monkeypatch.setattr(importlib.import_module("kernelmux.conformance.hookup"), "all_cases", lambda: cases)
    _, outcomes = checked("--case", name, fake=backend(silu=right()))
    assert list(outcomes) == [name]


def test_a_pattern_runs_all_that_it_matches_of_every_kernel():
    fake = backend(silu=[FakeKernel("a", work=compute), FakeKernel("b", work=compute)])
    result = check("--case", "silu-m1-*", "--json", fake=fake)
    outcomes = json.loads(result.out)["outcomes"]
    assert {outcome["kernel"] for outcome in outcomes} == {"fake:a", "fake:b"}
    assert {outcome["case"] for outcome in outcomes} == {name for name in CASES if name.startswith("silu-m1-")}


def test_refusals_show_their_reasons():
    def answer(node, m):
        return Declined("m is eight", kernel="f32") if m == 8 else right()

    result = check(fake=backend(silu=answer))
    assert result.code == 0
    assert any(
        line.startswith("refused\tfake:f32\t") and line.endswith("\tm is eight") for line in result.out.split("\n")
    )


def test_list_shows_one_case_a_line_and_runs_nothing():
    def explode(node, tensors):
        raise AssertionError("it runs")

    fake = backend(silu=[FakeKernel("a", work=explode), FakeKernel("b", work=explode)])
    result = check("--list", fake=fake)
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert result.code == 0
    expected = [name for name, case in CASES.items() if "large" not in case.marks]
    assert [name for _, name, *_ in lines] == expected
    assert all(op == "silu" and set(marks) == CASES[name].marks for op, name, *marks in lines)


def test_large_cases_are_left_out_unless_asked_for_and_smoke_is_a_part(all_of_the_suite):
    reference = importlib.import_module("kernelmux_reference")
    every, usual, smoke = (
        set(check("--list", "--op", "mul_mat", *more, reference=reference).out.splitlines())
        for more in (["--large"], [], ["--smoke"])
    )
    assert smoke < usual < every
    assert {line.rpartition("\t")[2] for line in every - usual} == {"large", "huge"}


def test_json_and_html_go_to_files_beside_the_text(tmp_path):
    asked = ("--smoke", "--save", tmp_path / "found.json", "--html", tmp_path / "found.html")
    result = check(*asked, fake=backend(silu=right()))
    document = json.loads((tmp_path / "found.json").read_text())
    assert result.code == 0
    assert document["backends"] == ["fake"]
    assert document["totals"]["pass"] == len(document["outcomes"]) > 0
    assert (tmp_path / "found.html").read_text().startswith("<!doctype html>")
    assert f"{document['totals']['pass']} pass" in result.out


def test_known_failures_are_no_failures(tmp_path):
    known = known_failures(tmp_path / "known.toml", "silu-m5-*", *(name for name in WRONG if "silu-m5-" not in name))
    code, outcomes = checked("--known", known, fake=backend(silu=wrong_for_five_rows()))
    assert code == 0
    assert {name for name, outcome in outcomes.items() if outcome["status"] == "known"} == set(WRONG)


def test_a_stale_entry_fails(tmp_path):
    known = known_failures(tmp_path / "known.toml", "silu-m1-n576", "silu-m99-*")
    result = check("--known", known, fake=backend(silu=right()))
    assert result.code == 1
    assert "stale: known.toml names silu-m1-n576, which passes now" in result.out
    assert "stale: known.toml names silu-m99-*, which is no case of this kernel" in result.out


def test_a_run_of_some_cases_takes_no_entry_about_others_for_stale(tmp_path):
    known = known_failures(tmp_path / "known.toml", "silu-m5-*", "silu-m99-*")
    code, outcomes = checked("--known", known, "--case", "silu-m1-n576", fake=backend(silu=right()))
    assert (code, list(outcomes)) == (0, ["silu-m1-n576"])


def test_a_peer_excuses_a_bound_that_it_misses_too():
    def rough(node, tensors):
        compute(node, tensors)
        tensors.outputs[0].mul_(1.01)

    fake = backend(convert=[FakeKernel("exact", work=compute), FakeKernel("rough", work=rough)])
    asked = ("--kernel", "fake:rough", "--case", "convert-f32-bf16-m1-n256")
    assert check(*asked, fake=fake).code == 1
    assert check(*asked, "--peer", "fake:rough", fake=fake).code == 0
    assert check(*asked, "--peer", "fake:exact", fake=fake).code == 1


def test_without_a_name_every_backend_is_checked_and_a_broken_one_is_noted_and_fails():
    def explode(node, m):
        raise ZeroDivisionError("in a hook")

    result = check("--smoke", fake=backend(silu=right()), broken=backend(silu=explode))
    assert result.code == 1
    assert "backend 'broken' is quarantined: ZeroDivisionError: in a hook" in result.err
    assert " 0 fail, 0 known" in result.out


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["--backend", "fakr"], ["unknown backend 'fakr'", "did you mean 'fake'?"]),
        (["--op", "silo"], ["unknown op 'silo'", "did you mean 'silu'?"]),
        (["--op", "rope"], ["fake offers no kernel of rope here; its kernels are of silu"]),
        (["--kernel", "fake:f33"], ["unknown kernel 'fake:f33'", "did you mean 'fake:f32'?"]),
        (["--kernel", "f32"], ["backend:kernel"]),
        (["--kernel", "fake:f32", "--backend", "other"], ["no kernel of backend other"]),
        (["--case", "silu-m1-n57"], ["did you mean 'silu-m1-n576'?", "--list"]),
        (["--peer", "fake:f33"], ["unknown kernel 'fake:f33'"]),
        (["--device", "tpu"], ["unknown device 'tpu'"]),
        (["--known", "nowhere.toml"], ["nowhere.toml"]),
        (["--save", "no/such/folder/f.json"], ["no/such/folder"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, hints):
    assert_one_line_error(check(*arguments, fake=backend(silu=right())), *hints)


def test_a_backend_asked_for_whose_hook_raises_is_an_error():
    def explode(node, m):
        raise ZeroDivisionError("in a hook")

    result = check("--backend", "broken", broken=backend(silu=explode))
    assert_one_line_error(result, "ZeroDivisionError: in a hook (test_check.py:")
    whole = check("--backend", "broken", "--verbose", broken=backend(silu=explode))
    assert whole.err.startswith("Traceback (most recent call last):\n")
    assert "in explode\n" in whole.err
    assert (whole.code, whole.out, whole.err.splitlines()[-1]) == (2, "", result.err.strip())


def test_a_kernel_that_raises_is_named_with_its_line_and_with_verbose_the_traceback():
    asked = ("--case", "silu-m5-n576")
    result = check(*asked, fake=backend(silu=Raising()))
    assert f"  raises: OverflowError: too many rows (test_check.py:{LINE})\n" in result.out
    assert "Traceback" not in result.out + result.err
    whole = check(*asked, "--verbose", fake=backend(silu=Raising()))
    assert (whole.code, whole.err) == (1, "")
    assert "Traceback (most recent call last):\n" in whole.out
    assert f"line {LINE}, in launch\n" in whole.out


def test_verbose_shows_the_traceback_of_a_broken_backend_beside_those_that_are_checked():
    def explode(node, m):
        raise ZeroDivisionError("in a hook")

    backends = {"fake": backend(silu=right()), "broken": backend(silu=explode)}
    result = check("--case", "silu-m5-n576", "--verbose", **backends)
    assert "in explode\n" in result.err
    assert "Traceback" not in check("--case", "silu-m5-n576", **backends).err


def test_without_any_backend_it_says_what_to_install():
    assert_one_line_error(check(), "no backend is installed", "pip install kernelmux-torch")


SMOKE = [name for name, case in CASES.items() if "smoke" in case.marks]


class Mended(FakeKernel):
    """Wrong while `faults` has cases in it, by their rows; it claims to be faster than anybody."""

    def __init__(self, *faults):
        super().__init__("mended", reading=1e6, emits=["f32", "f16"], work=self.compute)
        self.faults = set(faults)

    def compute(self, node, tensors):
        compute(node, tensors)
        if node.outputs[0].extents[0] in self.faults:
            tensors.outputs[0].add_(1)


def taken(**backends):
    with registry.isolated(**backends) as found:
        policy = parse_policy('[defaults]\nuse = "auto"\n', "p.toml")
        plan = make_plan(silu_graph(), policy, found, find_device())
    return plan.schedule(1, 1).steps[0].choice.name


def on_record(kernel):
    """What is known of it: whether its cases have passed, and whether some have failed."""
    with registry.isolated(fake=backend(silu=kernel)) as found:
        record = Record(found, find_device())
        return record.passed("silu", "fake:mended"), bool(record.failure("silu", "fake:mended", kernel))


def test_auto_does_not_take_what_has_failed_smoke_cases_until_they_pass():
    kernel = Mended(1)
    backends = {"fake": backend(silu=kernel), "other": backend(silu=right())}
    assert taken(**backends) == "fake:mended"
    assert check("--smoke", **backends).code == 1
    assert taken(**backends) == "other:f32"
    kernel.faults.clear()
    assert taken(**backends) == "other:f32"
    assert check("--kernel", "fake:mended", "--op", "silu", "--smoke", **backends).code == 0
    assert taken(**backends) == "fake:mended"


def test_a_kernel_that_leaves_a_step_out_is_checked_and_never_taken():
    wrong = LeavesOutTheGate()
    wrong.efficiency = FakeKernel(reading=1e6).efficiency
    backends = {"wrong": backend(silu=wrong), "other": backend(silu=right())}
    assert taken(**backends) == "wrong:kernel"
    check(**backends)
    assert taken(**backends) == "other:f32"


PASSED, FAILED, NOTHING = (True, False), (False, True), (False, False)


@pytest.mark.parametrize(
    ("faults", "arguments", "known"),
    [
        ((), ("--smoke",), PASSED),
        ((), (), PASSED),
        ((), ("--smoke", "--case", SMOKE[0]), NOTHING),
        ((), ("--case", "silu-m2-*"), NOTHING),
        ((1,), ("--case", SMOKE[0]), FAILED),
        ((2,), (), PASSED),
        ((1,), ("--case", "silu-m2-*"), NOTHING),
        ((1,), ("--smoke", "--peer", "fake:mended"), FAILED),
        ((), ("--smoke", "--peer", "fake:mended"), NOTHING),
    ],
    ids=str,
)
def test_a_failure_counts_at_once_and_a_pass_only_of_all_smoke_cases(faults, arguments, known):
    kernel = Mended(*faults)
    check(*arguments, fake=backend(silu=kernel))
    assert on_record(kernel) == known


def test_known_failures_are_none_on_record_either(tmp_path):
    kernel = Mended(1)
    known = tmp_path / "known.toml"
    known.write_text('[[failure]]\ncase = "silu-*"\nkernel = "fake:mended"\nreason = "r"\nlink = "l"\n')
    fake = backend(silu=kernel)
    assert check("--smoke", "--known", known, fake=fake).code == 0
    assert on_record(kernel) != FAILED


def test_cases_of_a_file_are_not_the_suites_and_leave_no_record(tiny, tmp_path):
    kernel, path = Mended(1), tmp_path / "cases.json"
    plain = ("--use", "*=reference:f32", "--use", "silu=torch:f32")
    assert call_command("run", tiny, "-p", "hello", "--max-tokens", 2, *plain, "--capture-cases", path).code == 0
    assert check("--cases", path, "--op", "silu", fake=backend(silu=kernel)).code == 1
    assert on_record(kernel) == NOTHING


class RefusesByExit(Kernel):
    name, ops = "f32", ("silu",)
    precision = 1e-6

    def refuses(self, node):
        raise SystemExit(0)

    def bind(self, node, tensors, stream):
        return lambda: None


@pytest.mark.parametrize("hook", ["kernel_classes", "refuses", "dispatch_silu", "device_refusal"])
def test_a_hook_that_exits_has_failed_as_one_that_raises(hook):
    plugin = types.ModuleType("broken")
    plugin.CONTRACT = CONTRACT
    plugin.kernel_classes = hookimpl(lambda: [RefusesByExit])

    def exits():
        raise SystemExit(0)

    if hook != "refuses":
        setattr(plugin, hook, hookimpl(exits))
    result = check("--backend", "broken", broken=plugin)
    assert_one_line_error(result, "SystemExit: 0 (test_check.py:")
    whole = check("--case", "silu-m5-n576", broken=plugin, fake=backend(silu=right()))
    assert whole.code == 1
    assert "SystemExit: 0" in whole.out + whole.err


@pytest.mark.parametrize("option", ["--save", "--html"])
@pytest.mark.parametrize("read", ["--known", "--cases"])
def test_a_report_does_not_take_the_place_of_what_is_read(option, read, tmp_path):
    path = known_failures(tmp_path / "read.toml", "silu-m5-n576")
    before = path.read_text()
    result = check(read, path, option, path, fake=backend(silu=right()))
    assert result.code == 2
    assert f"Invalid value for {option}: " in result.err
    assert "asked for: name another file" in result.err
    assert path.read_text() == before


def test_it_stops_at_the_case_that_it_is_told():
    code, outcomes = checked("--op", "silu", "--until", "silu-m1-n127", fake=backend(silu=right()))
    assert code == 0
    assert list(outcomes) == list(CASES)[: list(CASES).index("silu-m1-n127") + 1]
    missed = check("--op", "silu", "--until", "silu-m5-n57", fake=backend(silu=right()))
    assert_one_line_error(missed, "is called 'silu-m5-n57' (did you mean 'silu-m5-n576'?)", "--list")


def test_shares_of_the_cases_are_all_of_them_and_none_twice():
    def names(*arguments):
        with registry.isolated(fake=backend(silu=right())):
            listed = json.loads(call_command("check", "--list", "--json", *arguments).out)["cases"]
            return [case["name"] for case in listed]

    shares = [names("--shard", f"{part}/3") for part in (1, 2, 3)]
    assert all(shares)
    assert sorted(name for share in shares for name in share) == sorted(names())


def test_a_share_without_cases_says_so():
    result = check("--case", SMOKE[0], "--shard", "2/2", fake=backend(silu=right()))
    assert (result.code, "no case falls to share 2/2" in result.err) == (0, True)


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_a_share_is_one_of_so_many(shard):
    assert_one_line_error(call_command("check", f"--shard={shard}"), "it is K/N with K from 1 to N")


def test_a_case_that_does_not_come_back_is_named(monkeypatch):
    told = Event()
    say = progress._name_what_takes_long

    def listening(now, over, echo):
        say(now, over, lambda line: (echo(line), told.set()))

    def work(node, tensors):
        compute(node, tensors)
        assert told.wait(60)

    monkeypatch.setattr(progress, "LONG", 0.01)
    monkeypatch.setattr(progress, "_name_what_takes_long", listening)
    result = check("--case", SMOKE[0], fake=backend(silu=FakeKernel(work=work)))
    assert f"fake:f32 {SMOKE[0]} has been running for 0.01 s\n" in result.err
    assert result.code == 0


def test_what_ran_before_ctrl_c_is_told():
    def interrupted(node, tensors):
        compute(node, tensors)
        if node.outputs[0].extents[0] == 5:
            raise KeyboardInterrupt

    result = check(fake=backend(silu=FakeKernel(work=interrupted)))
    assert "interrupted after" in result.err
    assert " pass, " in result.out
    document = json.loads(check("--json", fake=backend(silu=FakeKernel(work=interrupted))).out)
    assert "interrupted after" in document["notes"][-1]
    assert result.code == 130


def test_what_was_found_is_told_though_ctrl_c_ends_the_running_again(monkeypatch):
    def interrupted(outcome, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("kernelmux.conformance.alone.tell_alone", interrupted)
    result = check(fake=backend(silu=wrong_for_five_rows()))
    assert "fail: fake:" in result.out
    assert " pass, " in result.out
    assert "interrupted while failures ran again" in result.err
    assert result.code == 130


def test_what_a_list_of_cases_does_not_write_is_refused(tmp_path):
    assert_one_line_error(check("--list", f"--html={tmp_path / 'x.html'}", fake=backend(silu=right())), "--html")
    assert list(tmp_path.iterdir()) == []


def test_known_failures_that_are_not_there_are_told_by_their_path(tmp_path):
    path = tmp_path / "none.toml"
    result = check(f"--known={path}", "--case", SMOKE[0], fake=backend(silu=right()))
    assert_one_line_error(result, "none.toml: No such file or directory")
    assert "[[failure]]" not in result.err


def test_a_backend_that_takes_no_case_says_why(monkeypatch):
    @hookimpl
    def kernel_classes():
        return [
            type("Far", (Kernel,), {"ops": ("silu",), "name": "far", "precision": 0, "devices": ("gpu",), "bind": id})
        ]

    plugin = types.SimpleNamespace(CONTRACT=CONTRACT, kernel_classes=kernel_classes)
    told = "takes none of the suite's cases on cpu: fake:far says: it runs on gpu, the plan is for cpu"
    assert_one_line_error(check(fake=plugin), told)


@pytest.mark.parametrize("option", ["--save", "--html"])
def test_a_file_that_cannot_be_written_loses_nothing_of_what_was_found(option):
    result = check("--case", "silu-m5-n576", f"{option}=/dev/full", fake=backend(silu=wrong_for_five_rows()))
    assert "fail: fake:f32 silu-m5-n576" in result.out
    assert "cannot write /dev/full: No space left on device" in result.err
    assert result.code == 2


def test_random_cases_that_cannot_be_written_are_drawn_again_by_their_command():
    fake = backend(silu=wrong_for_five_rows())
    result = check("--fuzz", 60, "--op", "silu", "--fuzz-cases", "/dev/full", fake=fake)
    assert "cannot write cases to /dev/full: No space left on device" in result.err
    (again,) = (line.partition("again: ")[2] for line in result.out.splitlines() if "again: " in line)
    assert "--fuzz 60 --seed 0 --until silu-drawn:" in again
    assert check(*shlex.split(again)[2:], fake=fake).code == 1


def test_an_interrupt_that_a_kernel_drops_ends_the_run_after_its_case(monkeypatch):
    counted = iter([0, 0])
    monkeypatch.setattr(sys.modules["kernelmux.cli.check"], "interrupts", lambda: next(counted, 1))
    result = check(fake=backend(silu=right()))
    assert "interrupted after 2 of " in result.err
    assert ", which did not let it through" in result.err
    assert "2 pass, 0 refused" in result.out
    assert result.code == 130


def test_a_case_for_which_memory_does_not_suffice_is_refused_and_the_others_run(tmp_path):
    case = Case("silu-small", "silu", (Value("x", (5, 3)),))
    write_cases([case, replace(case, name="silu-vast", inputs=(Value("x", (1, 10**13)),))], tmp_path / "vast.json")
    result = check("--cases", tmp_path / "vast.json", fake=backend(silu=right()))
    assert "3 pass, 1 refused, 0 fail" in result.out
    assert "out of memory" in result.out
    assert result.code == 0
