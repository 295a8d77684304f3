"""What a plan's steps are predicted to take: the sum of its calls, split by what bounds them."""

import pytest

from fake_backend import CPU, FakeKernel, chain, llama_graph, plan_for, whole_backend
from kernelmux.contract import registry
from kernelmux.contract.device import described_device
from kernelmux.graph.graph import Builder
from kernelmux.measure.predict import Predictor
from kernelmux.measure.table import Tables
from kernelmux.measure.times import Known
from kernelmux.plan.plan import make_plan
from kernelmux.plan.speed import Speeds
from kernelmux.policy.policy import parse_policy

CUDA = described_device("cuda sm_90 NVIDIA H200")


def planned(graph, policy="fuse = false\n", max_rows=8, device=CPU, **backends):
    with registry.isolated(**backends or {"a": whole_backend()}) as found:
        if device == CPU:
            return plan_for(graph, found, policy, max_rows=max_rows)
        return make_plan(graph, parse_policy(policy, "p.toml"), found, device, max_rows)


def matrix(n=4096, k=4096):
    b = Builder("one")
    x = b.leaf("x", ("m", k), role="state")
    return b.build(b.value("mul_mat", "y", x, weight=(b.leaf("w", (n, k)),)))


def test_a_step_takes_what_its_calls_are_predicted_to_take_with_a_row_of_logits_for_each_sequence():
    plan = planned(llama_graph(3), "", max_rows=200)
    for rows, outs in ((1, 1), (8, 8), (200, 1)):
        predictor, dims = Predictor(CPU, Tables(CPU)), {"m": rows, "outs": outs}
        steps = plan.schedule(rows, outs).steps
        us = sum(predictor.in_step(step.choice.kernel, step.node, step.node.rows_in(dims)).us for step in steps)
        speed = Speeds(plan).at(rows)
        assert speed.us == pytest.approx(us)
        assert speed.tokens_per_second == pytest.approx(rows * 1e6 / us)
        assert sum(speed.bounds.values()) == pytest.approx(1)
        assert sum(speed.shares.values()) == pytest.approx(1)
        assert sum(sum(counts.values()) for counts in speed.kernels.values()) == len(steps)


def most(plan, rows):
    return next(iter(Speeds(plan).at(rows).bounds))


def test_what_bounds_a_step_is_told_by_what_it_moves_and_computes():
    assert most(planned(matrix()), 1) == "reading weights"
    assert most(planned(matrix(), max_rows=512), 512) == "f32 arithmetic"
    assert most(planned(chain("silu")), 1) == "launching"
    assert most(planned(chain("silu", columns=2**24)), 8) == "activations"
    heads = {"heads": 32, "kv_heads": 32, "head_dim": 64, "feed_forward": 32, "vocab": 32}
    assert Speeds(planned(llama_graph(**heads))).at(8).bounds["attention"] > 0.1


def test_a_measured_time_is_split_as_a_declared_one(monkeypatch):
    declared = Speeds(planned(matrix())).at(1)
    assert declared.unmeasured == 1
    monkeypatch.setattr(
        Tables, "time", lambda self, kernel, node, rows, context: (Known(2 * declared.us), "measured here")
    )
    measured = Speeds(planned(matrix())).at(1)
    assert measured.us == pytest.approx(2 * declared.us, rel=1e-2)
    assert measured.unmeasured == 0
    assert list(measured.bounds) == ["reading weights", "launching"]
    launching = declared.bounds["launching"] * declared.us
    assert measured.bounds["launching"] * measured.us == pytest.approx(launching, rel=1e-2)


def test_where_a_card_waits_for_the_host_that_counts_as_launching():
    class Eager(FakeKernel):
        capturable = False

    captured, eager = (
        Speeds(planned(matrix(64, 64), device=CUDA, a=whole_backend(mul_mat=kernel)))
        for kernel in (FakeKernel(launches=99), Eager(launches=99))
    )
    assert eager.at(1).us > captured.at(1).us
    assert eager.at(1).bounds["launching"] > captured.at(1).bounds["launching"]
    # Faster kernels do not help the host.
    assert eager.at_best(1) == pytest.approx(eager.at(1).us)


def test_candidates_are_those_that_could_have_the_slowest_node():
    rough = FakeKernel("rough", precision=1.0)
    with_rough = whole_backend(mul_mat=[FakeKernel(), FakeKernel("other"), rough])
    policy = '[defaults]\nuse = ["auto"]\n'
    assert Speeds(planned(matrix(), policy, a=with_rough)).at(1).candidates == 2


def test_at_best_every_node_runs_at_the_ceilings_with_the_smallest_form_among_its_candidates():
    whole = FakeKernel(packed="whole", packed_bytes=4096 * 4096 * 4, reading=0.9)
    small = FakeKernel("small", packed="small", packed_bytes=4096 * 4096, reading=0.1)
    plan = planned(matrix(), '[defaults]\nuse = ["auto"]\n', a=whole_backend(mul_mat=[whole, small]))
    speeds = Speeds(plan)
    assert speeds.at(1).kernels == {"mul_mat": {"a:f32": 1}}
    ceilings = CPU.platform.ceilings(CPU)
    least = 4096 * 4096 / ceilings.read + ceilings.launch
    assert speeds.at_best(1) == pytest.approx(least * 1e6, rel=1e-2)


def test_a_graph_of_nothing_takes_no_time():
    b = Builder("none")
    speed = Speeds(planned(b.build(b.leaf("x", ("m", 8), role="state")))).at(1)
    assert (speed.us, speed.tokens_per_second, speed.kernels) == (0, 0, {})
