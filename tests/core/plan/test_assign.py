"""The assignment is the best there is: compared with trying everything."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelmux.plan.assign import Option, Wire, minimise, own_times, undominated, wire_times

FORMATS = ("f32", "bf16", "q8_32")


def seven_tenths(source: str, target: str) -> float:
    return 0.7


@st.composite
def problems(draw):
    """Slots with up to three options, and wires from each to some that come after it."""
    count = draw(st.integers(1, 5))
    ports = [draw(st.integers(1, 2)) for _ in range(count)]
    formats = st.permutations(FORMATS).flatmap(lambda order: st.integers(1, 3).map(lambda n: tuple(order[:n])))
    option = [
        st.builds(
            Option,
            st.just("kernel"),
            st.integers(0, 9).map(float),
            st.tuples(*[formats] * ports[slot]),
            st.tuples(formats),
            st.booleans(),
            st.booleans(),
        )
        for slot in range(count)
    ]
    slots = {slot: draw(st.lists(option[slot], min_size=1, max_size=3)) for slot in range(count)}
    wires = []
    for slot in range(count):
        later = [(other, port) for other in range(slot + 1, count) for port in range(ports[other])]
        readers = draw(st.lists(st.sampled_from(later), unique=True, max_size=3)) if later else []
        kept = draw(st.sampled_from(("", "f32")))
        wires.append(Wire((slot, 0), tuple(readers), "f32", draw(st.integers(1, 3)), seven_tenths, kept))
    counts = {slot: draw(st.integers(1, 3)) for slot in slots}
    return slots, counts, wires


def total(picked, counts, wires):
    own = sum(counts[slot] * option.us for slot, option in picked.items())
    return own + sum(wire.us(picked) for wire in wires)


@given(problems())
def test_no_other_choice_is_faster(problem):
    slots, counts, wires = problem
    left = {slot: undominated(options) for slot, options in slots.items()}
    factors = [own_times(slot, options, counts[slot]) for slot, options in left.items()]
    picked, us = minimise([*factors, *(wire_times(wire, left) for wire in wires)])
    assert us == pytest.approx(total({slot: left[slot][index] for slot, index in picked.items()}, counts, wires))
    everything = (dict(zip(slots, choice, strict=True)) for choice in itertools.product(*slots.values()))
    assert us == pytest.approx(min(total(choice, counts, wires) for choice in everything))


def test_a_slow_kernel_is_taken_where_a_fast_one_costs_conversions():
    fast, slow = Option("fast", 1.0, (("q8_32",),), (("f32",),)), Option("slow", 1.5, (("f32",),), (("f32",),))
    norm = Option("norm", 1.0, (), (("f32",),))
    reader = own_times(1, [fast, slow], 1)
    for readers, taken in (([(1, 0)], "slow"), ([(1, 0), (2, 0)], "fast")):
        options = {0: [norm], 1: [fast, slow], 2: [fast]}
        wire = wire_times(Wire((0, 0), tuple(readers), "f32", 1, seven_tenths), options)
        picked, _ = minimise([own_times(0, [norm], 1), reader, own_times(2, [fast], 1), wire])
        assert options[1][picked[1]].kernel == taken


def test_what_is_written_side_by_side_goes_to_nobody_who_reads_whole_rows():
    joined = Option("joined", 1.0, (), (("f32",),), joins=True)
    apart = Option("apart", 9.0, (), (("f32",),))
    whole = Option("whole", 1.0, (("f32",),), (), strided=False)
    options = {0: [joined, apart], 1: [whole]}
    wire = wire_times(Wire((0, 0), ((1, 0),), "f32", 1, seven_tenths), options)
    picked, _ = minimise([own_times(0, options[0], 1), own_times(1, options[1], 1), wire])
    assert options[0][picked[0]].kernel == "apart"


def test_equals_go_to_the_first():
    same = [Option(name, 2.0, (), ()) for name in ("exact", "rough")]
    assert minimise([own_times(0, same, 4)]) == ({0: 0}, 8.0)
