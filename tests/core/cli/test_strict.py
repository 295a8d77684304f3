"""`--strict`: what must be told of a plan is an error."""

import pytest

import kernelmux
from command import call_command
from kernelmux.errors import PlanError

NOTE = "kernelmux: {}:1: the policy was measured on cuda sm_90 NVIDIA H200, the plan is for cpu"
COMMANDS = {
    "plan": ["plan"],
    "run": ["run", "-p", "hello", "--max-tokens", 2],
    "bench": ["bench", "model", "--prompt", 4, "--context", 4, "--decode", 1, "--max-rows", 4],
}


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
    assert error == "kernelmux: PlanError: --strict takes no plan of which such things are to be said"


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
