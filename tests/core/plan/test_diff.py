"""What moves between two plans: alike moves as one row, and differences that kernels' names do not show."""

from dataclasses import replace

from command import read_table
from fake_backend import llama_graph, plan_for, silu_graph, whole_backend
from kernelmux.contract import registry
from kernelmux.plan.choice import Taken
from kernelmux.plan.diff import moves, show_diff


def planned(graph, policy="fuse = false\n"):
    with registry.isolated(a=whole_backend(), b=whole_backend()) as found:
        return plan_for(graph, found, policy)


def test_a_move_of_many_layers_and_row_counts_is_one_row():
    graph, silu = llama_graph(layers=4), 'fuse = false\n[[rule]]\nop = "silu"\nuse = "b"\n[defaults]\nuse = "a"\n'
    before, after = planned(graph), planned(graph, silu)
    assert {move.node for move in moves(before, after)} == {f"blk.{layer}.ffn_silu" for layer in range(4)}
    _, row, blank, last = show_diff(before, after).splitlines()
    assert read_table([row]) == [["blk.0..3.ffn_silu", "1..8", "a:f32", "b:f32", "rule 1 (line 2)"]]
    assert blank == ""
    assert last == f"4 nodes move; fingerprints {before.fingerprint} and {after.fingerprint}"


def test_plans_of_equal_kernels_differ_by_variants_and_by_what_follows_an_error():
    plan = planned(silu_graph())
    (step,) = plan.schedule(8, 8).steps

    def with_choice(**changes):
        steps = (replace(step, choice=replace(step.choice, **changes)),)
        return replace(plan, schedules={(8, 8): replace(plan.schedule(8, 8), steps=steps)})

    assert moves(plan, plan) == []
    (move,) = moves(plan, with_choice(variants=(Taken(8, "tile 32", "table"),)))
    assert "tile 32" in move.after
    (move,) = moves(plan, with_choice(on_error="next"))
    assert (move.before.split()[-1], move.after.split()[-1]) == ("on_error=error", "on_error=next")
