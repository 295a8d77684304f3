"""Domains: what is drawn from one covers it, which is told here from the domain alone; and what a case costs."""

import itertools
import random

import pytest

from kernelmux.conformance.case_file import read_cases, to_entry, write_cases
from kernelmux.conformance.draw import draw_case
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import CORE_OPS, OPS
from kernelmux.graph.ops.axes import CONTEXT, HEAD_DIMS, HEADS, PAGE_SIZES, ROWS, THETAS
from kernelmux.graph.ops.domain import BLIND, MOST, Domain, Extent, any_point, covering, label, smaller
from kernelmux.graph.ops.drawn import covering_cases, drawn_case

CORE = sorted(CORE_OPS)
DOMAINS = {name: OPS[name].domain() for name in CORE}
POINTS = {name: covering(domain) for name, domain in DOMAINS.items()}
ops = pytest.mark.parametrize("op", CORE)


def seen(op, *named):
    """The tuples of values that cases of the op have on these axes, where the others do not hide them."""
    points = (point for point in POINTS[op] if not hidden(point, named))
    return {tuple(point[name] for name in named) for point in points}


def hidden(point, named):
    return any((name, value) in BLIND and name not in named for name, value in point.items())


def together(domain, **values):
    """Whether a cheap point has these values: the plainest, or one that differs from it in one more axis or in two."""
    base = {**domain.plainest, **values}
    others = [(name, value) for name, listed in domain.axes.items() if name not in values for value in listed]
    changes = itertools.chain(((),), ((one,) for one in others))
    return any(domain.holds(p := {**base, **dict(change)}) and domain.work(p) <= MOST for change in changes)


# Coverage.


@ops
def test_every_value_of_every_choice_and_both_sides_of_every_border_occur(op):
    domain = DOMAINS[op]
    for name, values in domain.axes.items():
        assert {value for (value,) in seen(op, name)} == set(values), name


@ops
def test_every_pair_of_choices_that_go_together_occurs(op):
    domain = DOMAINS[op]
    for one, other in itertools.combinations(domain.choices, 2):
        lost = set(itertools.product(domain.choices[one], domain.choices[other])) - seen(op, one, other)
        assert not [pair for pair in lost if together(domain, **dict(zip((one, other), pair, strict=True)))]


@ops
def test_every_border_occurs_with_and_without_what_is_switched(op):
    domain = DOMAINS[op]
    switches = [name for name, values in domain.choices.items() if len(values) == 2]
    for extent, switch in itertools.product(domain.extents, switches):
        lost = set(itertools.product(domain.axes[extent], domain.choices[switch])) - seen(op, extent, switch)
        assert not [pair for pair in lost if together(domain, **dict(zip((extent, switch), pair, strict=True)))]


@pytest.mark.parametrize("op", [name for name in CORE if DOMAINS[name].groups])
def test_every_border_of_inputs_occurs_with_each_size_of_block(op):
    domain = DOMAINS[op]
    for extent, choice, group in domain.groups.values():
        met = {(border, group(value)) for border, value in seen(op, extent, choice)}
        lost = set(itertools.product(domain.axes[extent], map(group, domain.choices[choice]))) - met
        for border, block in lost:
            alike = [value for value in domain.choices[choice] if group(value) == block]
            assert not any(together(domain, **{extent: border, choice: value}) for value in alike)


@ops
def test_rows_are_short_and_long_with_each_value_of_a_choice_that_may_be(op):
    domain = DOMAINS[op]
    for name, extent in domain.extents.items():
        for choice, values in domain.choices.items():
            found = {(extent.third(number), value) for number, value in seen(op, name, choice)}
            for value in values:
                numbers = [n for n in extent.borders if together(domain, **{name: n, choice: value})]
                assert {extent.third(number) for number in numbers} <= {third for third, v in found if v == value}


@pytest.mark.parametrize("high", [1, 4, 5, 512, 20_480])
def test_borders_are_the_last_number_within_and_the_first_beyond(high):
    borders = Extent(1, high).borders
    assert {1, high} <= set(borders) <= set(range(1, high + 1))
    for power in (2**shift for shift in range(high.bit_length())):
        assert {side for side in (power, power + 1, 3 * power, 3 * power + 1) if side <= high} <= set(borders)


def test_domains_hold_what_real_models_use():
    attention, rope = DOMAINS["attention"], DOMAINS["rope"]
    assert {(9, 3), (28, 4), (32, 8), (64, 8), (64, 1)} <= set(HEADS) == set(attention.choices["heads"])
    assert {64, 80, 96, 128, 256} <= set(HEAD_DIMS)
    assert {1e4, 1e5, 5e5, 1e6} <= set(THETAS) == set(rope.choices["theta"])
    assert {16, 24, 32, 64} <= set(PAGE_SIZES)
    assert (CONTEXT.high, ROWS.high, attention.extents["sequences"].high) == (131_072, 512, 512)
    assert {"yarn", "llama3", "linear"} <= set(rope.choices["scaling"])
    assert {"f16-subnormals", "nan-and-infinity"} <= set(DOMAINS["convert"].choices["values"])
    assert "far-below-zero" in DOMAINS["silu"].choices["values"]


# Cases.


@ops
def test_points_are_cases_of_the_op_with_names_of_their_own(op):
    cases = list(covering_cases(OPS[op]))
    assert len({case.name for case in cases}) == len(cases) <= 400
    for case in cases:
        assert case.name.startswith(f"{op}-drawn:")
        assert not set("*?[]@ ") & set(case.name)
        case_node(case)


@ops
def test_cases_cost_little_but_for_the_longest_of_an_extent(op):
    works = [DOMAINS[op].work(point) for point in POINTS[op]]
    assert len([work for work in works if work > MOST]) <= 24
    assert max(works) <= 2**25


@ops
def test_random_points_are_in_the_domain_and_so_are_smaller_ones(op):
    domain, source = DOMAINS[op], random.Random(5)
    for point in [any_point(domain, source) for _ in range(40)]:
        assert domain.holds(point)
        for less in smaller(domain, point):
            (changed,) = (name for name in point if less[name] != point[name])
            if changed in domain.extents:
                assert domain.extents[changed].low <= less[changed] < point[changed]
            else:
                values = domain.choices[changed]
                assert values.index(less[changed]) < values.index(point[changed])


def test_points_are_the_same_in_every_run_and_a_larger_count_begins_with_a_smaller():
    domain = DOMAINS["copy"]
    first, second = ([any_point(domain, source) for _ in range(20)] for source in (random.Random(1), random.Random(1)))
    assert first == second
    assert covering(domain) == POINTS["copy"]


def test_a_label_tells_extents_and_what_is_not_plain():
    domain = DOMAINS["mul_mat"]
    assert label(domain, domain.plainest) == "m=1,n=32,k=1"
    point = {**domain.plainest, "format": "Q4_K", "bias": True, "k": 257}
    assert label(domain, point) == "m=1,n=32,k=257,format=Q4_K,bias"


@ops
def test_a_file_of_cases_gives_a_drawn_case_back_with_its_numbers(op, tmp_path):
    domain, source = DOMAINS[op], random.Random(2)
    cases = {case.name: case for case in (drawn_case(domain, any_point(domain, source)) for _ in range(8))}
    write_cases(cases.values(), tmp_path / "drawn.json")
    back = read_cases(tmp_path / "drawn.json").cases
    assert [case.name for case in back] == list(cases)
    for case in back:
        assert to_entry(case) == to_entry(cases[case.name])
        ours, theirs = draw_case(case), draw_case(cases[case.name])
        for (value, mine), (_, other) in zip(ours.planes, theirs.planes, strict=True):
            if value.format == "i32":
                assert mine[0].equal(other[0])
    write_cases(back, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "drawn.json").read_text()


def test_an_op_without_a_domain_has_the_cases_of_its_file_alone():
    class Bare(type(OPS["add"])):
        def domain(self):
            return None

    assert list(covering_cases(Bare())) == []


def test_a_domain_of_one_extent_is_covered_by_its_borders():
    only = Domain(lambda label, point: None, {}, {"n": Extent(1, 9)}, work=lambda point: point["n"])
    assert sorted(point["n"] for point in covering(only)) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
