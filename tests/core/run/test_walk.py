"""What a walk calls: launches in turn, and those of one chain as one."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from kernelmux.contract import Chain
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Launch
from kernelmux.errors import LaunchError
from kernelmux.run.walk import Walk

CALLED: list[str] = []


def joined(launches: Sequence[Launch]) -> Launch:
    def launch() -> None:
        CALLED.append(f"{len(launches)} at once")
        for each in launches:
            each()

    return launch


ONE, OTHER = Chain(joined), Chain(lambda launches: joined(launches))


def walk(*chains: Chain | None, calls: Sequence[Launch] = ()) -> Walk:
    steps: list[Any] = []
    for index, chain in enumerate(chains):
        node = SimpleNamespace(name=f"n{index}", op="silu", inputs=(), outputs=())
        steps.append(
            SimpleNamespace(node=node, choice=SimpleNamespace(name="a:b", kernel=SimpleNamespace(chain=chain)))
        )
    made = calls or [lambda index=index: CALLED.append(f"n{index}") for index in range(len(chains))]
    return Walk(steps, made, {}, len(chains), Device("cpu"))


@pytest.mark.parametrize(
    ("chains", "called"),
    [
        ((None, None), ["n0", "n1"]),
        ((ONE, ONE, ONE), ["3 at once", "n0", "n1", "n2"]),
        ((ONE, None, ONE, ONE), ["n0", "n1", "2 at once", "n2", "n3"]),
        ((ONE, OTHER, OTHER), ["n0", "2 at once", "n1", "n2"]),
    ],
    ids=["none", "all", "broken by another", "two chains"],
)
def test_launches_of_one_chain_beside_each_other_are_one_call(chains, called):
    CALLED.clear()
    assert walk(*chains)() == len(chains)
    assert called == CALLED


def test_who_raises_in_a_chain_is_told_by_its_first_step():
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(LaunchError, match=r"a:b raised at n1 \(silu, step 2 of 3\)"):
        walk(None, ONE, ONE, calls=[lambda: None, lambda: None, fail])()
