"""Errors: one tree to catch, and the nearest spelling of an unknown name."""

import pytest

from kernelmux import errors
from kernelmux.errors import KernelmuxError, nearest


@pytest.mark.parametrize("stage", ["Model", "Graph", "Policy", "Plan", "Backend", "Launch"])
def test_every_error_can_be_caught_as_one(stage):
    assert issubclass(getattr(errors, f"{stage}Error"), KernelmuxError)


def test_nearest_suggests_the_close_name_and_lists_all():
    assert nearest("rms_nrom", ["add", "rms_norm"]) == " (did you mean 'rms_norm'?); known: add, rms_norm"


def test_nearest_suggests_a_name_in_its_own_case():
    assert "did you mean 'Q4_K'" in nearest("q4k", ["f32", "Q4_K"])


def test_nearest_only_lists_where_nothing_is_close():
    assert nearest("zzzz", ["b", "a"]) == "; known: a, b"


def test_nearest_says_where_nothing_exists():
    assert nearest("torch", []) == "; known: none"


def test_nearest_is_the_same_in_any_order():
    names = ["torch:int4", "torch:int8", "torch:f32"]
    assert nearest("torch:in4", names) == nearest("torch:in4", reversed(names))
