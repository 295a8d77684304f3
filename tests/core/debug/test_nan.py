"""The first node that makes a NaN is named, with its kernel and rows; its numbers are a case that fails alike."""

import json

import pytest
import torch

import kernelmux
import kernelmux_reference
from command import assert_one_line_error, call_command
from kernelmux.conformance.case_file import read_cases
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.debug.nan import NanCheck, NotFiniteError
from kernelmux.graph.formats import as_tuple
from kernelmux.policy.policy import parse_policy
from wrong.kernel import Right

POLICY = '[[rule]]\nnode = "{}"\nuse = "odd"\n[defaults]\nuse = ["reference"]\n'


class Odd(Right):
    """Writes `value` where `where` says, of the rows that it has."""

    def __init__(self, value=float("nan"), where=lambda node, rows: [len(rows) - 1]):
        self.value, self.where = value, where

    def launch(self, node, tensors):
        super().launch(node, tensors)
        out = as_tuple(tensors.outputs[0])[0]
        for row in self.where(node, out):
            out[row].view(-1)[0] = self.value


@pytest.fixture
def odd(request):
    """A registry where `odd` takes mul_mat, silu and copy."""
    kernel = request.param if hasattr(request, "param") else Odd()
    with registry.isolated(odd=backend(mul_mat=kernel, silu=kernel, copy=kernel), reference=kernelmux_reference):
        yield kernel


def session_of(tiny, node, tokens=64):
    model = kernelmux.load(tiny)
    return model.session(model.plan(parse_policy(POLICY.format(node), "p.toml"), max_rows=8), tokens, sequences=2)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "1 NaN"), (float("-inf"), "1 infinite")])
@pytest.mark.parametrize("node", ["blk.1.ffn_down", "blk.0.ffn_silu", "logits"])
def test_the_node_its_kernel_and_the_rows_are_named(tiny, node, value, said):
    kernel = Odd(value)
    with registry.isolated(odd=backend(mul_mat=kernel, silu=kernel), reference=kernelmux_reference):
        session = session_of(tiny, node)
        session.feed(session.open(), [9, 9, 9])
        sequence = session.open()
        with session.watched(NanCheck(session)), pytest.raises(NotFiniteError) as raised:
            session.feed(sequence, [1, 2, 3, 4, 5])
    found = raised.value
    assert (found.node, found.kernel, found.positions) == (node, "odd:kernel", (4, 4))
    for part in (f"{node} (", f"{said} numbers by odd:kernel", "1 of 5 rows, of position 4", "it reads none"):
        assert part in str(found)


def test_what_pads_a_step_may_hold_anything(tiny):
    kernel = Odd(where=lambda node, rows: range(5, len(rows)))
    with registry.isolated(odd=backend(mul_mat=kernel), reference=kernelmux_reference):
        session = session_of(tiny, "blk.0.ffn_up")
        plain = session.feed(session.open(), [1, 2, 3, 4, 5]).clone()
        with session.watched(NanCheck(session)):
            assert session.feed(session.open(), [1, 2, 3, 4, 5]).equal(plain)


def test_a_cache_counts_where_the_step_has_written(tiny):
    """Of a cell that nobody has written nothing is said."""
    elsewhere, here = (Odd(where=lambda node, pages, cell=cell: [cell]) for cell in (-1, 0))
    for kernel, caught in ((elsewhere, False), (here, True)):
        with registry.isolated(odd=backend(copy=kernel), reference=kernelmux_reference):
            session = session_of(tiny, "blk.1.copy", tokens=128)
            with session.watched(NanCheck(session)):
                if caught:
                    with pytest.raises(NotFiniteError, match=r"blk.1.copy \(copy\) has 1 NaN .* position 0;"):
                        session.feed(session.open(), [1, 2, 3])
                else:
                    session.feed(session.open(), [1, 2, 3])


def test_numbers_that_were_there_before_are_told_apart(tiny):
    with registry.isolated(reference=kernelmux_reference):
        model = kernelmux.load(tiny)
        session = model.session(model.plan(), 64)
        sequence = session.open()
        session.feed(sequence, [1, 2, 3])
        as_tuple(session.walker.placement.leaves["blk.1.k_cache"])[0].view(-1, 32)[1] = torch.nan
        with session.watched(NanCheck(session)), pytest.raises(NotFiniteError, match=r"it reads some in input blk\.1"):
            session.feed(sequence, [4])


def test_a_run_saves_the_launch_as_a_case_that_check_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = tmp_path / "p.toml"
    policy.write_text(POLICY.format("blk.1.ffn_down"))
    with registry.isolated(odd=backend(mul_mat=Odd()), reference=kernelmux_reference):
        result = call_command("run", tiny, "-p", "hello there", "--policy", policy, "--check-nan")
        again = "again: kernelmux check --cases nan.json --kernel odd:kernel"
        assert_one_line_error(result, "NotFiniteError: blk.1.ffn_down (mul_mat) has 1 NaN numbers by odd:kernel", again)
        second = call_command("run", tiny, "-p", "hello there", "--policy", policy, "--check-nan")
        assert "again: kernelmux check --cases nan-2.json" in second.err
        (case,) = read_cases("nan.json").cases
        weight = kernelmux.load(tiny).source.file.weights["blk.1.ffn_down.weight"]
        assert case.draw["weight"].planes[0].equal(weight.planes[0])
        checked = call_command("check", "--cases", "nan.json", "--kernel", "odd:kernel", "--json")
        assert checked.code == 1
        assert json.loads(checked.out)["outcomes"][0]["status"] == "fail"
        assert call_command("check", "--cases", "nan.json", "--kernel", "reference:f32").code == 0


def test_a_folder_that_takes_no_file_hides_nothing(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with registry.isolated(odd=backend(mul_mat=Odd()), reference=kernelmux_reference):
        options = ("--use", "*=reference", "--use", "mul_mat=odd", "--check-nan")
        result = call_command("run", tiny, "-p", "hello", *options)
    assert_one_line_error(result, "NotFiniteError", "its inputs are not saved: cannot write a case to nan.json")
