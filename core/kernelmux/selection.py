"""Chooses one kernel for one node: the policy's order over what the backends offer, with a reason for everybody.

Enters: a node at a row count. Leaves: a Choice, or a PlanError that lists every refusal. Nodes that differ only in name
and layer share one asking of the backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kernelmux.device import Device
from kernelmux.errors import BackendError, PlanError, PolicyError, nearest
from kernelmux.formats import Value
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Declined, Kernel, ReasonKind
from kernelmux.policy import Policy
from kernelmux.registry import Offer, Registry

OFFICIAL = ("cupy", "numba", "reference", "torch", "triton")
"""Backends of this project: a policy may name one that is not installed, and goes on without it."""


@dataclass(frozen=True)
class Rejection:
    """A candidate that did not get a node, and why."""

    kernel: str
    reason: str
    kind: ReasonKind


@dataclass(frozen=True)
class Choice:
    """The kernel of a node, by full name, why it was chosen, and who lost."""

    name: str
    kernel: Kernel
    reason: str
    rejected: tuple[Rejection, ...]


@dataclass
class Selector:
    """Answers for one policy, registry and device; keeps what the backends offered, so that alike nodes ask once."""

    policy: Policy
    registry: Registry
    device: Device
    _kinds: dict[TensorNode, int] = field(default_factory=dict)
    _offers: dict[tuple[int, int], Offer] = field(default_factory=dict)
    _choices: dict[tuple[int, int, int | None], Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.registry.working:
            faults = "".join(f"; {b.name}: {b.fault}" for b in self.registry.backends.values())
            raise BackendError(f"no backend is installed: pip install kernelmux-torch (or kernelmux-reference){faults}")
        self._reject_unknown_backends()

    def kind(self, node: TensorNode) -> int:
        """The number of a node's kind: alike nodes, which differ only in name and layer, have one."""
        return self._kinds.setdefault(_nameless(node), len(self._kinds))

    def choose(self, node: TensorNode, kind: int, rows: int) -> Choice:
        """The kernel for a node of a kind at a row count; PlanError where none takes it."""
        rule = self.policy.match(node, rows, self.device)
        if (kind, rows, rule) not in self._choices:
            resolved = node.resolve({"m": rows, "outs": rows})
            if (kind, rows) not in self._offers:
                arguments = {"node": resolved, "device": self.device, **node.contract.arguments(resolved)}
                self._offers[kind, rows] = self.registry.ask(node.op, arguments)
            self._choices[kind, rows, rule] = self._pick(resolved, rule, self._offers[kind, rows])
        return self._choices[kind, rows, rule]

    def check_names(self) -> None:
        """PolicyError for a kernel that the policy names, of a backend that works, and that no answer has mentioned."""
        seen = {name for offer in self._offers.values() for name in (*offer.kernels, *offer.declined) if ":" in name}
        for index, rule in enumerate(self.policy.document.rule):
            for name in rule.use:
                backend = name.partition(":")[0]
                theirs = [known for known in seen if known.startswith(f"{backend}:")]
                if ":" in name and backend in self.registry.working and theirs and name not in theirs:
                    raise PolicyError(f"{self.policy.where(index)}: unknown kernel {name!r}{nearest(name, theirs)}")

    def _pick(self, node: TensorNode, rule: int | None, offer: Offer) -> Choice:
        rejected: list[Rejection] = []
        picked: tuple[str, str] | None = None
        for name, reason in self._order(rule, offer):
            if name in {loser.kernel for loser in rejected} or (picked and picked[0] == name):
                continue
            refusal = self._refusal(name, rule, offer)
            if refusal is None and picked is None:
                picked = (name, reason)
            elif refusal is None:
                assert picked is not None
                rejected.append(Rejection(name, f"{picked[0]} comes first in {picked[1]}", "outranked"))
            else:
                rejected.append(Rejection(name, refusal.reason, refusal.kind))
        if picked is None:
            raise PlanError(self._nobody(node, rule, rejected))
        return Choice(picked[0], offer.kernels[picked[0]], picked[1], tuple(rejected))

    def _order(self, rule: int | None, offer: Offer) -> Iterator[tuple[str, str]]:
        """Candidates in order of preference, each with the reason that would be given; refused ones among them."""
        document = self.policy.document
        if rule is not None:
            asked = document.rule[rule]
            for name in asked.use:
                yield from ((full, self.policy.where(rule)) for full in self._expand(name, offer))
            if asked.on_unsupported == "error":
                return
        named = {name.partition(":")[0] for name in document.defaults.use}
        for name in (*document.defaults.use, *(b for b in self.registry.working if b not in named)):
            yield from ((full, self.policy.where(None)) for full in self._expand(name, offer))

    def _expand(self, name: str, offer: Offer) -> list[str]:
        """A backend's kernels, offered first and refused after; or the one kernel that is named."""
        if ":" in name:
            return [name]
        offered = [full for full in offer.kernels if full.startswith(f"{name}:")]
        return offered + [full for full in offer.declined if full.partition(":")[0] == name] or [name]

    def _refusal(self, name: str, rule: int | None, offer: Offer) -> Declined | None:
        """Why a candidate cannot have the node, or None where it can."""
        document = self.policy.document
        backend = name.partition(":")[0]
        if name in document.forbid or backend in document.forbid:
            return Declined("the policy forbids it", "forbidden")
        if name not in offer.kernels:
            return self._absence(name, backend, offer)
        budget = (document.rule[rule].max_error if rule is not None else None) or document.defaults.max_error
        bound = offer.kernels[name].precision
        if budget is not None and bound > budget:
            return Declined(f"its error bound {bound:g} is over the budget {budget:g}", "over budget")
        return None

    def _absence(self, name: str, backend: str, offer: Offer) -> Declined:
        if name in offer.declined:
            return offer.declined[name]
        if backend in offer.declined:
            return offer.declined[backend]
        if backend not in self.registry.backends:
            return Declined(f"not installed: pip install kernelmux-{backend}", "missing dependency")
        if fault := self.registry.backends[backend].fault:
            return Declined(f"quarantined: {fault}", "not offered")
        return Declined(f"{backend} does not offer it for this node", "not offered")

    def _nobody(self, node: TensorNode, rule: int | None, rejected: list[Rejection]) -> str:
        shapes = ", ".join(
            f"{value.name} {list(value.shape)} {value.format}" for value in (*node.inputs, *node.weights)
        )
        refusals = "; ".join(f"{loser.kernel}: {loser.reason}" for loser in rejected) or "nobody was asked"
        return (
            f"no kernel takes {node.name} ({node.op} of {shapes}) on {self.device.kind}, "
            f"by {self.policy.where(rule)}: {refusals}"
        )

    def _reject_unknown_backends(self) -> None:
        """PolicyError for a backend that is neither installed nor this project's, unless its rule says `next`."""
        document = self.policy.document
        lists = [(index, rule.use) for index, rule in enumerate(document.rule) if rule.on_unsupported != "next"]
        for index, use in (*lists, (None, document.defaults.use)):
            for name in use:
                backend = name.partition(":")[0]
                official = backend in OFFICIAL and not (index is not None and not self.policy.lines[index])
                if backend not in self.registry.backends and not official:
                    known = nearest(backend, self.registry.backends)
                    raise PolicyError(f"{self.policy.where(index)}: unknown backend {backend!r}{known}")


def _nameless(node: TensorNode) -> TensorNode:
    """What two nodes have in common that are alike but for name and layer."""

    def unnamed(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(replace(value, name="") for value in values)

    return replace(
        node,
        name="",
        layer=None,
        inputs=unnamed(node.inputs),
        outputs=unnamed(node.outputs),
        weight=unnamed(node.weight),
        bias=unnamed(node.bias),
        gamma=unnamed(node.gamma),
    )
