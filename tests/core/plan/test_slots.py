"""A model's layers are a few slots, however many there are; their links count what conversions would cost."""

from fake_backend import CPU, chain, llama_graph
from kernelmux.contract.registry import Registry
from kernelmux.graph.ops import fused_ops
from kernelmux.graph.rewrite import find_fusions, fuse
from kernelmux.plan.offers import Offers
from kernelmux.plan.slots import Slotting


def slotting(graph, ops=None):
    return Slotting(graph, find_fusions(graph, fused_ops() if ops is None else ops), Offers(Registry({}), CPU).kind)


def test_4_layers_and_80_have_the_same_slots_and_links():
    few, many = (slotting(llama_graph(layers)).slots(frozenset()) for layers in (4, 80))
    assert len(few.members) == len(many.members)
    assert few.links.keys() == many.links.keys()
    assert sum(map(len, many.members.values())) == len(llama_graph(80).ops)


def test_a_slots_nodes_are_all_fused_or_none():
    graph = llama_graph(3)
    made = slotting(graph)
    for number, group in enumerate(made.groups):
        gone = {part for fusion in group for part in fusion.parts}
        for members in made.slots(frozenset()).members.values():
            assert len(gone.intersection(node.name for node in members)) in (0, len(members))
        kept = {node.name for members in made.slots(frozenset({number})).members.values() for node in members}
        assert kept == {node.name for node in fuse(graph.ops, group)}


def test_kinds_of_fusions_that_share_a_node_overlap():
    made = slotting(llama_graph(2))
    for one, group in enumerate(made.groups):
        for other, theirs in enumerate(made.groups):
            ours = {part for fusion in group for part in fusion.parts}
            shared = any(part in ours for fusion in theirs for part in fusion.parts)
            assert made.overlap(one, other) == shared


def test_a_link_joins_the_writer_of_a_value_and_all_its_readers():
    made = slotting(chain("silu", "add"), ops=[]).slots(frozenset())
    names = {slot: members[0].op for slot, members in made.members.items()}
    joined = {
        (link.writer and names[link.writer[0]], tuple(names[slot] for slot, _ in link.readers), link.kept): count
        for link, count in made.links.items()
    }
    assert joined[("silu", ("add",), False)] == 1 or joined[("silu", ("add", "add"), False)] == 1
    assert any(kept for _, _, kept in joined)
