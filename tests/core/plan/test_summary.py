"""What a plan says of itself in a few lines, and the same as data."""

import json
from dataclasses import asdict, replace

import pytest

from fake_backend import FakeKernel, chain, llama_graph, plan_for, whole_backend
from kernelmux.contract import registry
from kernelmux.plan import summary
from kernelmux.plan.summary import show_summary, summarise

BY_ROWS = '[[rule]]\nop = "mul_mat"\nm = "1..4"\nuse = "b"\n\n[defaults]\nuse = "a"\n'


def planned(graph, policy="fuse = false\n", **backends):
    with registry.isolated(**backends or {"a": whole_backend(), "b": whole_backend()}) as found:
        return plan_for(graph, found, policy)


def labels(plan):
    return [line.partition(" ")[0] for line in show_summary(plan, width=1000)]


def test_decoding_prompts_and_memory_are_told_and_kernels_once_where_they_are_the_same():
    assert labels(planned(llama_graph(2))) == ["decoding", "", "prompts", "memory"]
    assert labels(planned(llama_graph(2), BY_ROWS)) == ["decoding", "", "prompts", "", "memory"]


@pytest.mark.parametrize("width", [60, 100])
def test_no_line_is_wider_than_asked_and_no_word_is_lost(width):
    plan = planned(llama_graph(12, feed_forward=4096), BY_ROWS)
    lines = show_summary(plan, width)
    assert max(map(len, lines)) <= width
    assert " ".join(lines).split() == " ".join(show_summary(plan, width=1000)).split()
    assert len(lines) <= 7 or width < 100


def test_kernels_are_told_by_op_with_counts_where_they_share_one():
    policy = 'fuse = false\n[[rule]]\nop = "mul_mat"\nlayer = 1\nuse = "b"\n\n[defaults]\nuse = "a"\n'
    matrices = {"mul_mat": FakeKernel(reading=1e-6)}
    plan = planned(llama_graph(2), policy, a=whole_backend(**matrices), b=whole_backend(**matrices))
    assert show_summary(plan)[1].strip() == "mul_mat: 8 a:f32, 7 b:f32 (of 2 that could); the rest: a:f32"
    assert summarise(plan).decoding.kernels["mul_mat"] == {"a:f32": 8, "b:f32": 7}


def test_one_kernel_for_all_is_said_in_a_word():
    plan = planned(chain("silu", "add"), a=whole_backend())
    assert show_summary(plan)[1].strip() == "all 2 ops: a:f32"


def test_memory_is_that_of_the_plan_and_of_its_device_where_that_is_known():
    packing = {"mul_mat": FakeKernel(packed="mine", packed_bytes=3_000_000)}
    plan = planned(llama_graph(1), BY_ROWS, a=whole_backend(**packing), b=whole_backend(mul_mat=FakeKernel("b")))
    told = summarise(plan)
    assert (told.weights, told.second_copies) == (plan.packed_bytes, plan.extra_copy_bytes)
    layout = plan.schedule(8, 8).layout
    assert (told.activations, told.workspace, told.device_memory) == (layout.nbytes, layout.largest_workspace, 0)
    (line,) = (line for line in show_summary(plan) if line.startswith("memory"))
    assert f"cache {plan.kv_bytes_per_token} B a token" in line
    there = replace(plan, device=replace(plan.device, memory=8 * 10**9))
    assert f"{line}; cpu has 8.0 GB" in show_summary(there)


def test_what_was_missed_stands_last_a_line_each(monkeypatch):
    monkeypatch.setattr(summary, "missed", lambda plan, speeds: iter(["one", "two"]))
    assert show_summary(planned(chain("silu")))[-2:] == ["missed    one", "          two"]


def test_it_is_data_for_a_script():
    data = json.loads(json.dumps(asdict(summarise(planned(llama_graph(1))))))
    assert data["decoding"]["rows"] == 1
    assert data["prompts"]["rows"] == 8
    assert data["decoding"]["tokens_per_second"] == pytest.approx(1e6 / data["decoding"]["us"])
    assert data["missed"] == []
