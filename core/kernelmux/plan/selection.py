"""Chooses one kernel for one node: the policy's order over what the backends offer, with a reason for everybody.

Enters: a node at a row count. Leaves: a Choice, or a PlanError that lists every refusal. Nodes that differ only in name
and layer share one asking of the backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kernelmux.contract.answers import Offer
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Declined, Kernel
from kernelmux.contract.packed import Form, packed_form
from kernelmux.contract.registry import Registry
from kernelmux.errors import BackendError, PlanError, PolicyError, nearest
from kernelmux.graph.graph import TensorNode, nameless
from kernelmux.plan.choice import Choice, Rejection, stands_for, unreadable
from kernelmux.policy.policy import Policy

OFFICIAL = ("cupy", "numba", "reference", "torch", "triton")
"""Backends of this project: a policy may name one that is not installed, and goes on without it."""

LOCKED = "locked plan"
"""The reason for every choice of a plan that is read from a lock file."""


Held = Mapping[str, frozenset[Form]]
"""The packed forms that smaller row counts already need, by weight."""

Agreed = tuple[tuple[str, str, int | None], ...]
"""Of each part of a fusion: its kernel, the policy's words for it, and the rule."""

Refuse = Callable[[str, Kernel], Declined | None]


@dataclass
class Selector:
    """Answers for one policy, registry and device; keeps what the backends offered, so that alike nodes ask once.

    `banned` holds (node, kernel) pairs that have raised; `locked` the only kernels allowed, by row count and node.
    """

    policy: Policy
    registry: Registry
    device: Device
    banned: frozenset[tuple[str, str]] = frozenset()
    locked: Mapping[int, Mapping[str, str]] | None = None
    _kinds: dict[TensorNode, int] = field(default_factory=dict)
    _kind_of: dict[int, tuple[TensorNode, int]] = field(default_factory=dict)
    _offers: dict[tuple[int, int], Offer] = field(default_factory=dict)
    _choices: dict[tuple[int, int, int | None], Choice] = field(default_factory=dict)
    _fusions: dict[tuple[int, int, int | None, Agreed], Choice | None] = field(default_factory=dict)
    _matched: set[int | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.registry.working:
            faults = "".join(f"; {b.name}: {b.fault}" for b in self.registry.backends.values())
            raise BackendError(f"no backend is installed: pip install kernelmux-torch (or kernelmux-reference){faults}")
        if self.locked is None:
            self._reject_unknown_backends()

    def choose(self, node: TensorNode, rows: int, held: Held | None = None, exact: bool = True) -> Choice:
        """The kernel for a node at a row count; PlanError where none takes it.

        Unless `exact`, a form counts as held if one of its name is, stacked with whatever other weights: a fusion may
        still make it that one.
        """
        rule = self.policy.match(node, rows, self.device)
        self._matched.add(rule)
        own = self._own_refusal(node, held, exact)
        if own is not None or self.locked is not None:
            return self._pick(node, rows, rule, own)
        key = self._kind(node), rows, rule
        if key not in self._choices:
            self._choices[key] = self._pick(node, rows, rule, None)
        return self._choices[key]

    def fuse(
        self, node: TensorNode, rows: int, parts: Sequence[tuple[TensorNode, Choice]], held: Held | None = None
    ) -> Choice | None:
        """The kernel for a fused node, or None where its parts had better stay.

        A rule that names the fused op decides. Without one a kernel takes the place of others only if they would have
        agreed: it has the name of those that read weights, and the backend of the others, or one that it stands for.
        """
        rule = self.policy.match(node, rows, self.device)
        if rule is not None and node.op in (self.policy.document.rule[rule].op or ()):
            asked = self.policy.document.rule[rule]
            try:
                named = self.choose(node, rows, held)
            except PlanError:
                if asked.on_unsupported == "error":
                    raise
                return None
            if named.asked in asked.use:
                return named
        if (own := self._own_refusal(node, held, exact=True)) is not None:
            return self._agree(node, rows, rule, parts, own)
        agreed = tuple((choice.name, choice.asked, choice.rule) for _, choice in parts)
        key = self._kind(node), rows, rule, agreed
        if key not in self._fusions:
            self._fusions[key] = self._agree(node, rows, rule, parts, None)
        return self._fusions[key]

    def _agree(
        self,
        node: TensorNode,
        rows: int,
        rule: int | None,
        parts: Sequence[tuple[TensorNode, Choice]],
        own: Refuse | None,
    ) -> Choice | None:
        """The first kernel for a fused node that may run all of its parts."""
        offer = self._offer(node, rows)
        for name, kernel in offer.kernels.items():
            if not all(stands_for(name, kernel, part, choice) for part, choice in parts):
                continue
            if not all(self._within_budget(kernel, choice.rule) for _, choice in parts):
                continue
            if (self._refusal(name, node, rule, offer) or (own(name, kernel) if own else None)) is None:
                goes_on = any(choice.on_error == "next" for _, choice in parts)
                on_error = "next" if goes_on else self.policy.on_error(rule)
                reason = f"stands for {len(parts)} nodes with its name or backend"
                return Choice(name, kernel, reason, (), rule, name, on_error)
        return None

    def check_names(self) -> None:
        """PolicyError for a kernel that the policy names, of a backend that works, and that no answer has mentioned.

        Rules that matched no node are left out: what they name may well exist for other graphs.
        """
        op_of = {number: node.op for node, number in self._kinds.items()}
        seen: dict[str, set[str]] = {}
        for (kind, _), offer in self._offers.items():
            for name in (*offer.kernels, *offer.declined):
                if ":" in name:
                    seen.setdefault(name, set()).add(op_of[kind])
        document, asked = self.policy.document, set(op_of.values())
        lists = [
            (self.policy.where(index), rule.use, set(rule.op or asked))
            for index, rule in enumerate(document.rule)
            if index in self._matched
        ]
        lists += [(self.policy.where(None), document.defaults.use, asked), (self._forbid, document.forbid, asked)]
        for where, names, ops in lists:
            for name in names:
                backend = name.partition(":")[0]
                theirs = [known for known, of in seen.items() if known.startswith(f"{backend}:") and of & ops]
                if ":" in name and backend in self.registry.working and theirs and name not in theirs:
                    raise PolicyError(f"{where}: unknown kernel {name!r}{nearest(name, theirs)}")

    def _kind(self, node: TensorNode) -> int:
        """The number of a node's kind: alike nodes, which differ only in name and layer, have one."""
        known = self._kind_of.get(id(node))
        if known is None or known[0] is not node:
            number = self._kinds.setdefault(nameless(node), len(self._kinds))
            # Kept with the node, so that its id cannot come to mean another one.
            self._kind_of[id(node)] = known = (node, number)
        return known[1]

    def _offer(self, node: TensorNode, rows: int) -> Offer:
        key = self._kind(node), rows
        if key not in self._offers:
            resolved = node.resolve({"m": rows, "outs": rows})
            self._offers[key] = self.registry.offer(resolved, self.device)
        return self._offers[key]

    def _pick(self, node: TensorNode, rows: int, rule: int | None, own: Refuse | None) -> Choice:
        offer = self._offer(node, rows)
        rejected: dict[str, Rejection] = {}
        picked: tuple[str, str, str] | None = None
        for name, reason, asked in self._order(node, rows, rule, offer):
            if name in rejected or (picked and picked[0] == name):
                continue
            refusal = self._refusal(name, node, rule, offer) or (own(name, offer.kernels[name]) if own else None)
            if refusal is not None:
                rejected[name] = Rejection(name, refusal.reason, refusal.kind)
            elif picked is None:
                picked = (name, reason, asked)
            else:
                rejected[name] = Rejection(name, f"{picked[0]} comes first in {picked[1]}", "outranked")
        if picked is None:
            self.check_names()
            resolved = node.resolve({"m": rows, "outs": rows})
            raise PlanError(self._nobody(resolved, rule, list(rejected.values())))
        name, reason, asked = picked
        return Choice(
            name, offer.kernels[name], reason, tuple(rejected.values()), rule, asked, self.policy.on_error(rule)
        )

    def _order(self, node: TensorNode, rows: int, rule: int | None, offer: Offer) -> Iterator[tuple[str, str, str]]:
        """Candidates in order of preference, each with its reason and the policy's words; refused ones among them."""
        document = self.policy.document
        name = self._locked_name(node, rows)
        if name and (node.name, name) not in self.banned:
            yield name, LOCKED, name
            return
        if rule is not None:
            for asked in document.rule[rule].use:
                yield from ((full, self.policy.where(rule), asked) for full in self._expand(asked, offer))
            if document.rule[rule].on_unsupported == "error":
                return
        # Installed backends that the defaults do not name come last, by name; broken ones too, so that they are shown.
        for asked in (*document.defaults.use, *self.registry.backends):
            yield from ((full, self.policy.where(None), asked) for full in self._expand(asked, offer))

    def _locked_name(self, node: TensorNode, rows: int) -> str:
        """The kernel that a lock file has for a node; empty where it has none."""
        bucket = min((top for top in self.locked or () if top >= rows), default=0)
        return (self.locked or {}).get(bucket, {}).get(node.name, "")

    def _expand(self, name: str, offer: Offer) -> list[str]:
        """A backend's kernels, offered first and refused after; or the one kernel that is named."""
        if ":" in name:
            return [name]
        offered = [full for full in offer.kernels if full.startswith(f"{name}:")]
        return offered + [full for full in offer.declined if full.partition(":")[0] == name] or [name]

    def _refusal(self, name: str, node: TensorNode, rule: int | None, offer: Offer) -> Declined | None:
        """Why a candidate cannot have a node of this kind, or None where it can."""
        forbidden = self.policy.document.forbid
        backend = name.partition(":")[0]
        if name in forbidden or backend in forbidden:
            return Declined("the policy forbids it", "forbidden")
        if name not in offer.kernels:
            return self._absence(name, backend, offer)
        kernel = offer.kernels[name]
        if (fault := unreadable(name, kernel, node)) is not None:
            return fault
        if not self._within_budget(kernel, rule):
            budget = self.policy.max_error(rule)
            return Declined(f"its error bound {kernel.precision:g} is over the budget {budget:g}", "over budget")
        return None

    def _within_budget(self, kernel: Kernel, rule: int | None) -> bool:
        budget = self.policy.max_error(rule)
        return budget is None or kernel.precision <= budget

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

    def _own_refusal(self, node: TensorNode, held: Held | None, exact: bool) -> Refuse | None:
        """What rules out kernels for this very node: that they raised, or that they need one more packed form."""
        banned = {kernel for name, kernel in self.banned if name == node.name}
        limit = self.policy.document.weights.copies
        if not banned and (limit is None or held is None or not node.weights):
            return None

        def refuse(name: str, kernel: Kernel) -> Declined | None:
            if name in banned:
                return Declined("it raised in a walk", "raised")
            if limit is None or held is None:
                return None
            form = packed_form(node, name, kernel)
            if form is None:
                return None
            for value in node.weights:
                forms = held.get(value.name, frozenset())
                known = form in forms or (not exact and form[1] in {name for _, name in forms})
                if not known and len(forms) >= limit:
                    return Declined(f"{value.name} has {len(forms)} packed forms already, the limit", "over budget")
            return None

        return refuse

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
        where, rules = self.policy.where, enumerate(document.rule)
        lists = [(where(i), rule.use, self.policy.lines[i]) for i, rule in rules if rule.on_unsupported != "next"]
        lists += [(where(None), document.defaults.use, 1), (self._forbid, document.forbid, 1)]
        for place, names, from_file in lists:
            for name in names:
                backend = name.partition(":")[0]
                if backend not in self.registry.backends and not (backend in OFFICIAL and from_file):
                    raise PolicyError(f"{place}: unknown backend {backend!r}{nearest(backend, self.registry.backends)}")

    @property
    def _forbid(self) -> str:
        return f"forbid ({self.policy.source}:{self.policy.forbid_line})"
