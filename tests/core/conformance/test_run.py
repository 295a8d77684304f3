"""One case on one kernel: what depends on several kernels, or on what was offered."""

from dataclasses import replace

import pytest
import torch

from fake_backend import FakeKernel, compute
from kernelmux.conformance import Variant, run_case
from kernelmux.conformance.case_file import reread
from kernelmux.conformance.draw import draw_case
from kernelmux.conformance.hookup import all_cases
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.graph.ops import OPS
from kernelmux.graph.ops.drawn import drawn_case
from wrong.elementwise import Rescaled, ScalesFrom240
from wrong.kernel import Right

CASES = {case.name: case for case in all_cases()}


def run(name, kernel="fake:kernel", variant=None, peer="", **answers):
    with registry.isolated(fake=backend(**answers)) as current:
        return run_case(CASES[name], kernel, current, "cpu", variant, peer)


class Packs(Right):
    """It names its packed form."""

    packed = "dense"


class PacksDoubled(Packs):
    """Twice the weight, and half the result."""

    name = "other"

    def prepare(self, weights, device):
        return tuple(2 * part for part in super().prepare(weights, device))

    def answer(self, node, operands):
        return tuple(result / 2 for result in super().answer(node, operands))


class PacksOnItsOwn(PacksDoubled):
    packed = ""


# Packed forms.


def test_kernels_of_one_packed_name_pack_the_same_bytes():
    (failure,) = run("mul_mat-f32-m5-n7-k32", mul_mat=[Packs(), PacksDoubled()]).failures
    assert failure == "declarations: fake:other packs other bytes under the name dense"
    assert run("mul_mat-f32-m5-n7-k32", mul_mat=[Packs(), PacksOnItsOwn()]).passed


def test_a_fused_kernel_shares_them_with_its_plain_parts():
    name = next(name for name in CASES if name.startswith("mul_mat_add-f32-m5"))
    outcome = run(name, mul_mat_add=Packs(), mul_mat=PacksDoubled())
    assert outcome.failures == ("declarations: fake:other packs other bytes under the name dense",)


# Rows.


def test_a_kernel_offered_for_m_rows_takes_one():
    class ForExactly(Right):
        """It multiplies by the rows it was made for, and divides by those it has."""

        def __init__(self, m):
            self.m = m

        def answer(self, node, operands):
            (result,) = super().answer(node, operands)
            return (result * self.m / len(result),)

    outcome = run("silu-m5-n576", silu=lambda node, m: ForExactly(m))
    (failure,) = outcome.failures
    assert failure.startswith("error: NMSE 16 ")
    assert "; the worst is silu[0, " in failure
    assert failure.endswith(" of [1, 576]; 100 % of its elements are wrong, everywhere, for the last row alone")


# Rough products inside a fused op.


class RoughProducts(Right):
    """Gate times up, of weights in e4m3 with a scale a row: each product is within 6e-3, what they make is not."""

    precision = 6e-3

    def answer(self, node, operands):
        gate, up = (
            operands.inputs[0] @ rounded(weight).T + bias
            for weight, bias in zip(operands.weight, operands.bias or (0, 0), strict=True)
        )
        return (torch.nn.functional.silu(gate) * up,)


class UpForGate(RoughProducts):
    """The same, of the other product the gate."""

    def answer(self, node, operands):
        swapped = replace(operands, weight=operands.weight[::-1], bias=operands.bias[::-1])
        return super().answer(node, swapped)


def rounded(weight):
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 448
    return (weight / scales).to(torch.float8_e4m3fn).to(weight.dtype) * scales


# Of the second few elements are large, so that the error of those is that of the whole.
AMPLIFIED = (
    {"m": 2, "n": 16, "k": 257, "format": ("Q6_K", "Q6_K"), "bias": True},
    {"m": 2, "n": 32, "k": 1024, "format": ("Q5_1", "Q5_1"), "values": "zero-row", "stored": "bf16"},
    {"m": 5, "n": 96, "k": 576, "format": ("Q4_1", "Q4_1")},
)


@pytest.mark.parametrize("point", AMPLIFIED, ids=str)
def test_what_a_fused_op_makes_of_the_error_of_its_products_is_no_failure(point):
    domain = OPS["gate_up_swiglu"].domain()
    case = drawn_case(domain, {**domain.plainest, **point})
    for kernel, fails in ((RoughProducts(), False), (UpForGate(), True)):
        with registry.isolated(fake=backend(gate_up_swiglu=kernel)) as current:
            assert bool(run_case(case, "fake:kernel", current).failures) == fails


# Threads.


def test_small_cases_have_one_thread_but_for_some_and_the_processes_own_stay_as_they_are():
    seen = {}

    def counted(node, tensors):
        seen[names[-1]] = torch.get_num_threads()
        compute(node, tensors)

    threads, names = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with registry.isolated(fake=backend(silu=FakeKernel(work=counted))) as current:
            for name in [name for name in CASES if name.startswith("silu-") and "large" not in CASES[name].marks]:
                names.append(name)
                assert run_case(CASES[name], "fake:f32", current).passed
                assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert set(seen.values()) == {1, 3}
    assert list(seen.values()).count(3) < len(seen) / 5


# Peers.


class Rough(FakeKernel):
    """One per cent off."""

    def __init__(self, name, where=lambda tensors: True):
        super().__init__(name, work=self.launch)
        self.where = where

    def launch(self, node, tensors):
        compute(node, tensors)
        if self.where(tensors):
            tensors.outputs[0].mul_(1.01)


def test_a_peer_excuses_what_it_misses_itself():
    both = [Rough("kernel"), Rough("peer"), FakeKernel("exact", work=compute)]
    assert run("add-m5-n576", add=both).failures
    assert run("add-m5-n576", add=both, peer="fake:peer").passed
    assert run("add-m5-n576", add=both, peer="fake:exact").failures


def test_a_peer_excuses_nothing_that_is_wrong_only_in_place():
    def in_place(tensors):
        return tensors.outputs[0].data_ptr() == tensors.inputs[0].data_ptr()

    outcome = run("add-m5-n576", add=[Rough("kernel", in_place), Rough("peer")], peer="fake:peer")
    assert [failure.partition(":")[0] for failure in outcome.failures] == ["in place"]


def test_a_peer_without_a_finite_error_excuses_nothing():
    def nothing(node, tensors):
        tensors.outputs[0].fill_(torch.nan)

    assert run("add-m5-n576", add=[Rough("kernel"), FakeKernel("peer", work=nothing)], peer="fake:peer").failures


@pytest.mark.parametrize("formats", ["f32-fp8_row", "f32-fp8_block", "fp8_block-f32"])
@pytest.mark.parametrize("m", [2, 3, 17])
def test_a_row_alone_is_stored_as_it_is_in_the_batch(formats, m):
    """Also where scales lie by columns; two rows of two blocks have the same shape either way."""
    assert run(f"convert-{formats}-m{m}-n256", convert=Right()).batch_invariant


# Formats.


@pytest.mark.parametrize("place", ["inputs1", "all"])
def test_a_variant_stores_what_it_names_so(place):
    seen = []

    def work(node, tensors):
        seen.append([planes.dtype for planes in tensors.inputs])
        compute(node, tensors)

    kernel = FakeKernel("kernel", takes=["f32", "bf16"], work=work)
    assert run("add-m5-n576", add=kernel, variant=Variant(place, "bf16")).passed
    assert seen[0] == [torch.bfloat16 if place == "all" else torch.float32, torch.bfloat16]


def test_a_bound_of_nothing_is_one():
    class Exact(Right):
        precision = 0.0

        def outputs(self, node):
            return [["f64"]]

    assert run("mul-m5-n576", mul=Exact()).passed


# Messages.


def test_what_is_not_written_is_told_first_and_where():
    class LeavesTheLastRow(Right):
        def write(self, node, tensors, results):
            tensors.outputs[0][:-1] = results[0][:-1]

    first, *others = run("add-m5-n576", add=LeavesTheLastRow()).failures
    assert first.startswith("written: add[4, 0] is left as it was, expected ")
    assert first.endswith(" of [5, 576]; 20 % of its elements are, all in the last row")
    assert any(failure.startswith("finite: add[4, 0] = nan") for failure in others)


def test_a_launch_that_differs_from_the_one_before_says_where():
    class Counts(Right):
        def bind(self, node, tensors, stream):
            call, launches = super().bind(node, tensors, stream), []

            def launch():
                call()
                launches.append(1)
                tensors.outputs[0][2, 64:128] += len(launches) - 1

            return launch

    first = run("add-m5-n576", add=Counts()).failures[0]
    assert first.startswith("repeatable: two launches on the same inputs differ: add[2, 64] = ")
    assert first.endswith(" of [5, 576]; 2.22 % of its elements are wrong, all in row 2 and columns 64..127")


# Scales.


def test_a_wrong_scale_is_shown_with_the_one_of_the_contract():
    (failure,) = run("convert-f32-fp8_row-m5-n256", convert=ScalesFrom240()).failures
    assert failure.startswith("scales: the scales of convert[")
    assert ", the largest magnitude over the largest that an element holds; 100 % of its elements" in failure


@pytest.mark.parametrize("by", [1 + 1e-6, 1 + 3e-4])
def test_a_scale_may_be_rounded(by):
    class Rounded(Rescaled):
        target = "q8_32"

    kernel = Rounded()
    kernel.by = by
    assert run("convert-f32-q8_32-m5-n256", convert=kernel).passed


# Numbers.


def test_kernels_of_one_case_share_its_numbers_until_one_fails(monkeypatch):
    drawn = []

    def draw(case):
        drawn.append(case.name)
        return draw_case(case)

    monkeypatch.setattr("kernelmux.conformance.draw.draw_case", draw)
    case, other = CASES["silu-m5-n576"], CASES["silu-m2-n1536"]
    turns = [(case, "one"), (case, "two"), (case, "bad"), (case, "two"), (other, "one"), (case, "one")]
    wrong = FakeKernel("kernel", work=lambda node, tensors: tensors.outputs[0].fill_(7))
    kernels = {"one": Right(), "two": Right(), "bad": wrong}
    with registry.isolated(**{name: backend(silu=kernel) for name, kernel in kernels.items()}) as current:
        passed = [run_case(each, f"{name}:kernel", current).passed for each, name in turns]
    assert passed == [name != "bad" for _, name in turns]
    assert drawn == [case.name, case.name, other.name, case.name]


def test_a_zero_of_another_sign_that_a_cache_held_before_is_no_change_of_it():
    """The slot is written, and its numbers are what they were: a random case accused every kernel."""
    op = OPS["copy"]
    domain = op.domain()
    point = {**domain.plainest, "m": 512, "page_size": 1, "values": "denormals", "stored": "f16"}
    case = reread(drawn_case(domain, point))
    assert case.name == "copy-drawn:m=512,page_size=1,values=denormals,stored=f16"
    outcome = run_case(case, "reference:f64", registry.current())
    assert (outcome.status, outcome.failures) == ("pass", ())
