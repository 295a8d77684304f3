"""What a walk costs above its launches: 500 of them that do nothing, walked, and called by hand in a loop."""

import pytest
import torch

from fake_backend import CPU, FakeKernel, chain, plan_for
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.run.walker import Walker

NODES = 500


@pytest.fixture(scope="module")
def walk():
    with registry.isolated(noop=backend(silu=FakeKernel("noop"))) as found:
        plan = plan_for(chain(*["silu"] * NODES), found)
    return Walker(plan, PackedWeights({}, CPU), {"x": torch.zeros(8, 8)}).bind(m=1)


def _by_hand(calls):
    for call in calls:
        call()
    return len(calls)


@pytest.mark.benchmark(group="500 launches that do nothing")
@pytest.mark.parametrize("way", ["walk", "by hand"])
def test_500_launches(benchmark, walk, way):
    run, args = (walk, ()) if way == "walk" else (_by_hand, (walk.calls,))
    launches = benchmark.pedantic(run, args=args, rounds=20, iterations=5, warmup_rounds=2)
    assert launches == NODES
    if benchmark.stats is not None:  # None where benchmarks are disabled
        benchmark.extra_info["ns_per_node"] = round(benchmark.stats.stats.min / NODES * 1e9, 1)
