"""The assignment is the best there is: compared with trying everything."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelmux.graph.formats import Value
from kernelmux.plan.assign import Link, Option, link_times, minimise, own_times, undominated

FORMATS = ("f32", "bf16", "q8_32")


X = Value("", ("m", 64))


def seven_tenths(value: Value, source: str, target: str) -> float:
    return 0.7


def free(*formats):
    """Formats whose storage takes no time, for a port each."""
    return tuple(dict.fromkeys(each, 0.0) for each in formats)


@st.composite
def problems(draw):
    """Slots with up to three options, and links from each to some that come after it."""
    count = draw(st.integers(1, 5))
    ports = [draw(st.integers(1, 2)) for _ in range(count)]
    storage = st.sampled_from([-0.2, 0.0, 0.3])
    formats = st.permutations(FORMATS).flatmap(
        lambda order: st.integers(1, 3).flatmap(lambda n: st.fixed_dictionaries(dict.fromkeys(order[:n], storage)))
    )
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
    links = []
    for slot in range(count):
        later = [(other, port) for other in range(slot + 1, count) for port in range(ports[other])]
        readers = draw(st.lists(st.sampled_from(later), unique=True, max_size=3)) if later else []
        links.append((Link((slot, 0), tuple(readers), X, draw(st.booleans())), draw(st.integers(1, 3))))
    counts = {slot: draw(st.integers(1, 3)) for slot in slots}
    return slots, counts, links


def total(picked, counts, links):
    own = sum(counts[slot] * option.us for slot, option in picked.items())
    return own + sum(count * link.us(picked, seven_tenths) for link, count in links)


@given(problems())
def test_no_other_choice_is_faster(problem):
    slots, counts, links = problem
    left = {slot: undominated(options) for slot, options in slots.items()}
    factors = [own_times(slot, options, counts[slot]) for slot, options in left.items()]
    picked, us = minimise([*factors, *(link_times(link, count, left, seven_tenths) for link, count in links)])
    assert us == pytest.approx(total({slot: left[slot][index] for slot, index in picked.items()}, counts, links))
    everything = (dict(zip(slots, choice, strict=True)) for choice in itertools.product(*slots.values()))
    assert us == pytest.approx(min(total(choice, counts, links) for choice in everything))


def test_a_slow_kernel_is_taken_where_a_fast_one_costs_conversions():
    fast = Option("fast", 1.0, free(["q8_32"]), free(["f32"]))
    slow = Option("slow", 1.5, free(["f32"]), free(["f32"]))
    norm = Option("norm", 1.0, (), free(["f32"]))
    reader = own_times(1, [fast, slow], 1)
    for readers, taken in (([(1, 0)], "slow"), ([(1, 0), (2, 0)], "fast")):
        options = {0: [norm], 1: [fast, slow], 2: [fast]}
        link = link_times(Link((0, 0), tuple(readers), X, False), 1, options, seven_tenths)
        picked, _ = minimise([own_times(0, [norm], 1), reader, own_times(2, [fast], 1), link])
        assert options[1][picked[1]].kernel == taken


def test_what_is_written_side_by_side_goes_to_nobody_who_reads_whole_rows():
    joined = Option("joined", 1.0, (), free(["f32"]), joins=True)
    apart = Option("apart", 9.0, (), free(["f32"]))
    whole = Option("whole", 1.0, free(["f32"]), (), strided=False)
    options = {0: [joined, apart], 1: [whole]}
    link = link_times(Link((0, 0), ((1, 0),), X, False), 1, options, seven_tenths)
    picked, _ = minimise([own_times(0, options[0], 1), own_times(1, options[1], 1), link])
    assert options[0][picked[0]].kernel == "apart"


def test_equals_go_to_the_first():
    same = [Option(name, 2.0, (), ()) for name in ("exact", "rough")]
    assert minimise([own_times(0, same, 4)]) == ({0: 0}, 8.0)
