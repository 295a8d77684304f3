"""A kernel that spins is named, with its stack, and ends the process; what is only slow elsewhere does not."""

import subprocess
import sys
import time

import pytest

import kernelmux
from command import TIMEOUT, clean_environment
from kernelmux.debug.watchdog import EXIT_CODE, Watchdog
from kernelmux.errors import LaunchError

SPINNING = """
import collections, itertools, sys, time
sys.path[:0] = {path!r}
import kernelmux_reference
from kernelmux.cli import main
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from wrong.kernel import Right

class Spinning(Right):
    def prepare(self, weights, device):
        {packing}
        return super().prepare(weights, device)

    def launch(self, node, tensors):
        {spin}
        super().launch(node, tensors)

def spin_forever():
    while True:
        time.sleep(0.01)

with registry.isolated(spin=backend(mul_mat=Spinning()), reference=kernelmux_reference):
    sys.argv = ["kernelmux", *{arguments!r}]
    main()
"""


POLICY = '[[rule]]\nnode = "blk.1.ffn_down"\nuse = "spin"\n[defaults]\nuse = ["reference"]\n'


def ended(tiny, folder, spin, *, packing="pass", command=("run", "-p", "hello"), policy=POLICY):
    path = folder / "spin.toml"
    path.write_text(policy)
    options = ("--policy", str(path), "--watchdog", "0.5")
    arguments = [command[0], str(tiny), *command[1:], *options]
    code = SPINNING.format(path=sys.path, spin=spin, packing=packing, arguments=arguments)
    (folder / "spinning.py").write_text(code)
    asked = {"capture_output": True, "text": True, "timeout": TIMEOUT, "env": clean_environment()}
    return subprocess.run([sys.executable, "-c", "import spinning"], cwd=folder, input="hello\n", **asked)


@pytest.mark.parametrize("command", [("run", "-p", "hello"), pytest.param(("chat",), marks=pytest.mark.slow)])
def test_a_kernel_that_spins_is_named_with_its_stack(tiny, tmp_path, command):
    result = ended(tiny, tmp_path, "spin_forever()", command=command)
    assert result.returncode == EXIT_CODE == 75
    said = next(line for line in result.stderr.splitlines() if "has not come back" in line)
    node = "spin:kernel at blk.1.ffn_down (mul_mat, step "
    for part in (node, "within 0.5 s", " rows; ", "blk.1.ffn_down.weight [64, 96] f32"):
        assert part in said
    assert "in spin_forever" in result.stderr
    assert "in blk.1.ffn_down (mul_mat) by spin:kernel" in result.stderr


def test_a_second_kernel_that_spins_is_named_as_such(tiny, tmp_path):
    """It was waited for in silence: only the launch of the step's own kernel was watched."""
    command = ("run", "-p", "hello", "--use", "*=reference", "--shadow", "spin:1/1")
    result = ended(tiny, tmp_path, "spin_forever()", command=command, policy="")
    assert result.returncode == EXIT_CODE, result.stderr
    assert "spin:kernel, beside reference:f32, at " in result.stderr
    assert "in spin_forever" in result.stderr


@pytest.mark.slow
def test_one_that_never_lets_go_of_pythons_lock_is_named_too(tiny, tmp_path):
    result = ended(tiny, tmp_path, "collections.deque(itertools.repeat(0), maxlen=0)")
    assert result.returncode == 1
    assert "in blk.1.ffn_down (mul_mat) by spin:kernel" in result.stderr


@pytest.mark.slow
def test_packing_is_no_launch(tiny, tmp_path):
    result = ended(tiny, tmp_path, "pass", packing="time.sleep(1.2)")
    assert result.returncode == 0, result.stderr


def test_launches_that_come_back_or_raise_leave_nothing_behind(tiny):
    """Of a watchdog that is over no thread is left that would end the process."""
    model = kernelmux.load(tiny)
    session = model.session(model.plan(use=["*=reference"]), 64)
    plain = session.feed(session.open(), [1, 2, 3]).clone()
    session = model.session(model.plan(use=["*=reference"]), 64)
    dog = Watchdog(0.2)

    def broken(walk, index):
        raise OverflowError("too many rows")

    with dog.watching(), session.watched(dog):
        assert session.feed(session.open(), [1, 2, 3]).equal(plain)
        walk = session.walker.bind(m=3, outs=1, seqs=1)
        object.__setattr__(walk, "calls", [lambda: broken(walk, 0)])
        with pytest.raises(LaunchError, match="too many rows"):
            walk()
        time.sleep(0.7)
