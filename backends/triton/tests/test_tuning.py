"""Which tiling is chosen: shipped, remembered, measured or by rule, and the same every time."""

import json

import pytest

from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import make_node
from kernelmux_triton import mul_mat, tuning
from kernelmux_triton.tuning import Shape, choose

CARD = Device("cuda", 0, "NVIDIA Test Card", (9, 0))
H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", (9, 0))
LARGE = Shape("gemv", 1, 4096, 4096)
TILINGS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A process that has decided nothing, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_decided", {})
    monkeypatch.setattr(tuning, "shipped", lambda card: {})


@pytest.fixture
def card_is_there(monkeypatch):
    monkeypatch.setattr(tuning, "can_measure", lambda device: True)


def never(tilings):
    raise AssertionError("measured")


def test_rows_are_classed_by_powers_of_two():
    assert [Shape.of("k", m, 1, 1).m for m in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]


def test_without_a_card_the_rule_decides():
    assert choose(CARD, LARGE, TILINGS, "b", never) == "b"
    assert not tuning.cache_path(CARD.name).exists()


@pytest.mark.usefixtures("card_is_there")
def test_the_fastest_is_measured_once_and_remembered(monkeypatch):
    assert choose(CARD, LARGE, TILINGS, "b", lambda tilings: [3.0, None, 2.0]) == "c"
    monkeypatch.setattr(tuning, "_decided", {})
    assert choose(CARD, LARGE, TILINGS, "b", never) == "c"


@pytest.mark.usefixtures("card_is_there")
def test_small_matrices_and_failures_leave_the_rule():
    assert choose(CARD, Shape("gemv", 1, 96, 256), TILINGS, "b", never) == "b"
    assert choose(CARD, LARGE, TILINGS, "b", lambda tilings: [None] * 3) == "b"
    assert not tuning.cache_path(CARD.name).exists()


def test_the_shipped_table_goes_before_the_cache(monkeypatch):
    tuning.remember(CARD.name, {str(LARGE): "a"})
    monkeypatch.setattr(tuning, "shipped", lambda card: {str(LARGE): "c"})
    assert choose(CARD, LARGE, TILINGS, "b") == "c"


def test_a_tiling_that_is_no_more_is_passed_over():
    tuning.remember(CARD.name, {str(LARGE): "gone"})
    assert choose(CARD, LARGE, TILINGS, "b") == "b"


def test_what_was_chosen_stays_for_the_process():
    assert choose(CARD, LARGE, TILINGS, "b") == "b"
    tuning.remember(CARD.name, {str(LARGE): "a"})
    assert choose(CARD, LARGE, TILINGS, "b") == "b"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 0}', '{"version": 1, "choices": 3}', "\udcff"])
def test_a_damaged_cache_is_no_cache_and_is_written_anew(damage):
    path = tuning.cache_path(CARD.name)
    path.parent.mkdir(parents=True)
    path.write_text(damage, "utf-8", "surrogateescape")
    assert choose(CARD, LARGE, TILINGS, "b") == "b"
    tuning.remember(CARD.name, {"shape": "a"})
    assert json.loads(path.read_text())["choices"] == {"shape": "a"}


def test_the_cache_is_replaced_as_a_whole(monkeypatch):
    tuning.remember(CARD.name, {"one": "a"})
    path = tuning.cache_path(CARD.name)
    before = path.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("full")))
    tuning.remember(CARD.name, {"two": "b"})
    assert path.read_text() == before


def test_a_plan_for_a_card_that_is_not_there_measures_nothing():
    """Large enough to be measured where it is."""
    node = make_node("mul_mat", "y", Value("x", ("m", 4096)), weight=(Value("w", (4096, 4096), "Q4_K"),))
    for m in (1, 16, 512):
        offered = [kernel for kernel in mul_mat.offer(node, m, H100) if not hasattr(kernel, "reason")]
        assert offered
        bound = mul_mat.with_rows(node, m)
        assert [kernel.chosen(bound) for kernel in offered] == [kernel.chosen(bound) for kernel in offered]
