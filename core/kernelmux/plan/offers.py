"""What backends answered for a graph's nodes: nodes that differ only in name and layer share one asking.

Enters: nodes at row counts. Leaves: offers, and what was asked for which op, so that names can be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kernelmux.contract.answers import Offer
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Declined, Kernel
from kernelmux.contract.registry import Registry
from kernelmux.graph.graph import TensorNode, nameless
from kernelmux.plan.budget import added_error, may_overflow
from kernelmux.plan.choice import unreadable


@dataclass(frozen=True)
class Fitness:
    """How a kernel fits a node, at whatever row count."""

    fault: Declined | None
    """Why it cannot read an input."""
    overflows: bool
    """Whether activations of such a model may be more than it can hold."""
    error: float
    """What it adds."""


@dataclass
class Offers:
    """A registry's answers for one device, each asked for once."""

    registry: Registry
    device: Device
    _kinds: dict[TensorNode, int] = field(default_factory=dict)
    _kind_of: dict[int, tuple[TensorNode, int]] = field(default_factory=dict)
    _offers: dict[tuple[int, int], Offer] = field(default_factory=dict)
    _fitness: dict[tuple[int, Kernel], Fitness] = field(default_factory=dict)

    def kind(self, node: TensorNode) -> int:
        """The number of a node's kind: alike nodes, which differ only in name and layer, have one."""
        known = self._kind_of.get(id(node))
        if known is None or known[0] is not node:
            number = self._kinds.setdefault(nameless(node), len(self._kinds))
            # Kept with the node, so that its id cannot come to mean another one.
            self._kind_of[id(node)] = known = (node, number)
        return known[1]

    def of(self, node: TensorNode, rows: int) -> Offer:
        """Every backend's answer for a node at a row count."""
        key = self.kind(node), rows
        if key not in self._offers:
            self._offers[key] = self.registry.offer(node.at(rows), self.device)
        return self._offers[key]

    def fitness(self, kernel: Kernel, node: TensorNode) -> Fitness:
        """How a kernel fits a node; its formats are asked for once. BackendError where it declares none that can be."""
        key = self.kind(node), kernel
        if key not in self._fitness:
            fault = unreadable(kernel, node)
            self._fitness[key] = Fitness(fault, may_overflow(kernel, node), added_error(kernel, node))
        return self._fitness[key]

    @property
    def names(self) -> Mapping[str, set[str]]:
        """Every kernel that an answer has mentioned, by full name, and the ops of the nodes that it was about."""
        op_of = {number: node.op for node, number in self._kinds.items()}
        found: dict[str, set[str]] = {}
        for (kind, _), offer in self._offers.items():
            for name in offer.names:
                found.setdefault(name, set()).add(op_of[kind])
        return found
