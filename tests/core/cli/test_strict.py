"""What is asked for and not used is told, and with `--strict` is an error; so is a kernel that raises."""

import json
from types import SimpleNamespace

import pytest

import kernelmux
from command import call_command
from fake_backend import FakeKernel, compute
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.errors import LaunchError, PlanError
from kernelmux.graph.ops import CORE_OPS, OPS, Fused
from kernelmux.policy.policy import parse_policy

PLAIN = [op for op in CORE_OPS if not isinstance(OPS[op], Fused)]
STOPPED = "kernelmux: PlanError: --strict takes no plan of which such things are to be said"

NOTE = "kernelmux: {}:1: the policy was measured on cuda sm_90 NVIDIA H200, the plan is for cpu"
COMMANDS = {
    "plan": ["plan"],
    "run": ["run", "-p", "hello", "--max-tokens", 2],
    "bench": ["bench", "model", "--prompt", 4, "--context", 4, "--decode", 1, "--max-rows", 4],
}


def _plain():
    return {op: FakeKernel(work=compute) for op in PLAIN}


@pytest.fixture
def tuned(tmp_path):
    path = tmp_path / "tuned.toml"
    path.write_text('tuned_for = "cuda sm_90 NVIDIA H200"\n')
    return path


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_note_is_an_error_where_it_is_asked_for_and_else_is_told(command, tiny, tuned):
    told = call_command(*command, tiny, "--policy", tuned)
    assert told.code == 0
    assert told.err.startswith(NOTE.format(tuned))
    refused = call_command(*command, tiny, "--policy", tuned, "--strict")
    assert (refused.code, refused.out) == (1, "")
    note, error = refused.err.splitlines()
    assert note.startswith(NOTE.format(tuned))
    assert error == STOPPED


def test_both_plans_of_a_comparison_are_held_to_it(tiny, tuned):
    assert call_command("plan", tiny, "--diff", "default", tuned).code == 0
    assert call_command("plan", tiny, "--diff", "default", tuned, "--strict").code == 1


def test_a_plan_without_notes_is_no_other_for_it(tiny):
    assert call_command("plan", tiny, "--strict") == call_command("plan", tiny)


def test_in_python_it_is_an_error_that_has_all_notes(tiny, tuned):
    model = kernelmux.load(tiny)
    with pytest.raises(
        PlanError, match=r"a plan that is strict has no notes: .*tuned\.toml:1: the policy was measured"
    ):
        model.plan(tuned, use=["silu=torch"], strict=True)
    assert model.plan(tuned).notes


# What is asked for and not used: told, and an error with `--strict`.

BROKEN = SimpleNamespace(CONTRACT=99)
ASKED = {
    "a rule that matches nothing": ('[[rule]]\nop = "mul_mat"\nlayer = 40\nuse = "a"\n', "matches no node of tiny"),
    "a requirement about nothing": ('[[require]]\nop = "silu"\nlayer = 40\nkernel = "a"\n', "matches no node of "),
    "a rule behind another": ('[[rule]]\nuse = "a"\n[[rule]]\nop = "silu"\nuse = "a"\n', "rule 2 is never reached"),
    "a backend that is broken": ('[[rule]]\nuse = ["broken", "a"]\n', "asks for broken, which is quarantined: "),
    "a broken one in the defaults": ('[defaults]\nuse = ["broken", "a"]\n', "asks for broken, which is quarantined: "),
    "a backend that is absent": ('[[rule]]\nuse = ["triton", "a"]\n', "asks for triton, which is not installed: "),
    "an absent one in the defaults": ('[defaults]\nuse = ["triton", "a"]\n', "asks for triton, which is not installed"),
    "a kernel that nothing gets": ('[[rule]]\nuse = "b:f32"\n', "no node of tiny on "),
    "defaults that nothing gets": ('[defaults]\nuse = ["b"]\n', "no node of tiny on "),
}
USED = {
    "an op that is not there": ("mul_mat_pair=a", "--use mul_mat_pair=a matches no node of tiny"),
    "a kernel that declines": ("silu=b:f32", "--use silu=b:f32: no node of tiny on "),
}


@pytest.fixture
def backends():
    declining = Declined("not today", kernel="f32")
    with registry.isolated(a=backend(**_plain()), b=backend(**dict.fromkeys(PLAIN, declining)), broken=BROKEN):
        yield


@pytest.mark.parametrize(("policy", "said"), ASKED.values(), ids=ASKED)
def test_what_a_policy_asks_for_and_does_not_get_is_told(backends, tiny, tmp_path, policy, said):
    path = tmp_path / "p.toml"
    path.write_text(policy)
    _is_told(said, tiny, "--policy", path)


@pytest.mark.parametrize(("use", "said"), USED.values(), ids=USED)
def test_what_an_option_asks_for_and_does_not_get_is_told(backends, tiny, use, said):
    _is_told(said, tiny, "--use", use)


def _is_told(said, *arguments):
    told = call_command("plan", *arguments)
    assert told.code == 0
    (line,) = told.err.splitlines()
    assert line.startswith("kernelmux: ")
    assert said in line
    for command in COMMANDS.values():
        refused = call_command(*command, *arguments, "--strict")
        assert (refused.code, refused.out) == (1, "")
        assert refused.err.splitlines() == [line, STOPPED]


def test_the_notes_of_a_locked_plan_are_told_where_it_runs(tiny, tmp_path, tuned):
    path = tmp_path / "plan.lock"
    assert call_command("plan", tiny, "--policy", tuned, "--lock", path).code == 0
    told = call_command("run", tiny, "-p", "hello", "--max-tokens", 2, "--plan", path)
    assert told.code == 0
    assert told.err.startswith(NOTE.format(tuned))
    refused = call_command("run", tiny, "-p", "hello", "--max-tokens", 2, "--plan", path, "--strict")
    assert (refused.code, refused.err.splitlines()[-1]) == (1, STOPPED)
    assert call_command("plan", tiny, "--diff", path, path, "--strict").code == 1
    with pytest.raises(PlanError, match="a plan that is strict has no notes: "):
        kernelmux.load(tiny).locked_plan(path, strict=True)


# A kernel that raises in a walk, where the policy goes on without it.

NEXT = '[defaults]\nuse = ["flaky", "a"]\non_error = "next"\n'
WALKS = {name: COMMANDS[name] for name in ("run", "bench")}


def _flaky(where):
    def launch(node, tensors):
        raise OverflowError("out of tiles")

    kernel = FakeKernel(work=launch if where == "launch" else compute, packed_bytes=64, packed=f"strict {where}")
    if where != "launch":
        setattr(kernel, where, lambda *told: launch(None, None))
    return backend(rms_norm=kernel)


@pytest.mark.parametrize("where", ["prepare", "bind", "launch"])
@pytest.mark.parametrize("command", WALKS.values(), ids=WALKS)
def test_a_kernel_that_raises_is_replaced_and_told_and_is_an_error_where_strict(tiny, tmp_path, command, where):
    path = tmp_path / "p.toml"
    path.write_text(NEXT)
    with registry.isolated(flaky=_flaky(where), a=backend(**_plain())):
        told, refused = (call_command(*command, tiny, "--policy", path, *more) for more in ((), ("--strict",)))
    assert told.code == 0
    assert "flaky:f32 raised at " in told.err
    assert "OverflowError: out of tiles" in told.err
    assert "; a:f32 runs instead" in told.err
    assert (refused.code, refused.out.strip()) == (2, "")
    assert "LaunchError: flaky:f32 raised at blk." in refused.err
    assert refused.err.endswith('the policy goes on without it (on_error = "next"), and strict does not\n')


def test_what_is_said_of_a_run_names_what_ran_and_the_kernel_that_raised_only_as_such(tiny, tmp_path):
    path, result = tmp_path / "p.toml", tmp_path / "bench.json"
    path.write_text(NEXT)
    with registry.isolated(flaky=_flaky("launch"), a=backend(**_plain())):
        text = call_command(*COMMANDS["run"], tiny, "--policy", path)
        data = call_command(*COMMANDS["run"], tiny, "--policy", path, "--json")
        bench = call_command(*COMMANDS["bench"], tiny, "--policy", path, "--save", result)
    assert [line for line in text.err.splitlines() if "flaky" in line] == data.err.splitlines()
    document = json.loads(data.out)
    raised = document.pop("replaced")
    assert {each["kernel"] for each in raised} == {"flaky:f32"}
    assert {name for each in raised for name in each["instead"]} == {"a:f32"}
    assert "flaky" not in json.dumps(document)
    assert set(document["kernels"]["rms_norm"]) == {"a:f32"}
    assert bench.code == 0
    noted = json.loads(result.read_text())
    assert [note for note in noted.pop("notes") if "flaky:f32 raised at" in note]
    assert "flaky" not in json.dumps(noted)


def test_in_python_a_strict_plan_goes_on_without_no_kernel(tiny):
    with registry.isolated(flaky=_flaky("launch"), a=backend(**_plain())):
        model = kernelmux.load(tiny)
        policy = parse_policy(NEXT, "p.toml")
        assert model.forward([1, 2], model.plan(policy)).shape == (2, 269)
        with pytest.raises(LaunchError, match=r"out of tiles.*strict does not$") as caught:
            model.forward([1, 2], model.plan(policy, strict=True))
    assert (caught.value.kernel, caught.value.node) == ("flaky:f32", "blk.0.attn_norm")
