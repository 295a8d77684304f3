"""Names in a policy: what is broken is said aloud, or is an error where a rule insists."""

import re
from types import SimpleNamespace

import pytest

from command import call_command
from fake_backend import plan_for, silu_graph, whole_backend
from kernelmux.contract import registry
from kernelmux.errors import PolicyError

BROKEN = SimpleNamespace(CONTRACT=99)
FAULT = "is quarantined: BackendError: the backend was built for contract 99"


def planned(policy="", **more):
    with registry.isolated(a=whole_backend(), broken=BROKEN) as found:
        return plan_for(silu_graph(), found, policy, **more)


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"use": ["silu=broken"]}, r"--use silu=broken asks for broken, which "),
        ({"use": ["*=broken:fast,a"]}, r"--use \*=broken:fast,a asks for broken, which "),
        ({"policy": '[[rule]]\nuse = ["broken", "a"]\n'}, r"rule 1 \(p\.toml:1\) asks for broken, which "),
        ({"policy": '[[rule]]\nuse = "broken"\non_unsupported = "next"\n'}, r"rule 1 \(p\.toml:1\) asks for broken, "),
    ],
    ids=["use", "a kernel", "rule", "next"],
)
def test_asking_for_a_quarantined_backend_is_noted_with_its_fault(asked, place):
    plan = planned(**asked)
    assert plan.schedule(1, 1).steps[0].choice.name == "a:f32"
    (note,) = plan.notes
    assert re.match(place, note)
    assert FAULT in note


def test_nobody_is_told_of_a_broken_backend_that_was_not_asked_for():
    assert planned().notes == ()
    assert planned('[defaults]\nuse = ["broken", "a"]\n').notes == ()


def test_it_is_an_error_where_the_rule_says_so():
    rule = '[[rule]]\nuse = "broken:fast"\non_unsupported = "error"\n'
    with pytest.raises(PolicyError, match=rf"^rule 1 \(p\.toml:1\) asks for broken:fast, and broken {FAULT}") as caught:
        planned(rule)
    assert (caught.value.file, caught.value.line, caught.value.backend) == ("p.toml", 1, "broken")


def test_the_command_line_says_it_on_stderr_and_goes_on(tiny):
    with registry.isolated(a=whole_backend(), broken=BROKEN):
        result = call_command("plan", tiny, "--use", "silu=broken")
    assert result.code == 0
    assert f"--use silu=broken asks for broken, which {FAULT}" in result.err
