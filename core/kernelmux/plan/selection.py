"""Chooses one kernel for one node: the policy's order over what the backends offer, with a reason for everybody.

Enters: a node at a row count. Leaves: a Choice, or a PlanError that lists every refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from kernelmux.contract.answers import Offer
from kernelmux.contract.kernel import Declined, Kernel
from kernelmux.contract.packed import Form, packed_form
from kernelmux.errors import BackendError, PlanError
from kernelmux.graph.graph import TensorNode
from kernelmux.plan.choice import Choice, Placed, Rejection, unreadable
from kernelmux.plan.names import absent_names, unknown_kernels
from kernelmux.plan.offers import Offers
from kernelmux.policy.policy import Policy

Held = Mapping[str, frozenset[Form]]
"""The packed forms that smaller row counts already need, by weight."""

Locked = Mapping[int, Mapping[str, Placed]]
"""The choices of a locked plan by row count and node; their kernels are looked up anew."""

Refuse = Callable[[str, Kernel], Declined | None]


@dataclass
class Selector:
    """Answers for one policy and one device's offers; alike nodes are chosen for once.

    `banned` holds (node, kernel) pairs that have raised; `locked` the only choices allowed.
    """

    policy: Policy
    offers: Offers
    banned: frozenset[tuple[str, str]] = frozenset()
    locked: Locked | None = None
    _choices: dict[tuple[int, int, int | None], Choice] = field(default_factory=dict)
    _matched: set[int | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        registry = self.offers.registry
        if not registry.working:
            faults = "".join(f"; {b.name}: {b.fault}" for b in registry.backends.values())
            raise BackendError(f"no backend is installed: pip install kernelmux-torch (or kernelmux-reference){faults}")
        if self.locked is None:
            for finding in absent_names(self.policy, registry):
                if finding.weight == "error":
                    raise finding.error(self.policy)

    def choose(self, node: TensorNode, rows: int, held: Held | None = None, exact: bool = True) -> Choice:
        """The kernel for a node at a row count; PlanError where none takes it.

        Unless `exact`, a form counts as held if one of its name is, stacked with whatever other weights: a fusion may
        still make it that one.
        """
        if (locked := self._locked(node, rows)) is not None:
            return locked
        rule = self.match(node, rows)
        own = self.own_refusal(node, held, exact)
        if own is not None:
            return self._pick(node, rows, rule, own)
        key = self.offers.kind(node), rows, rule
        if key not in self._choices:
            self._choices[key] = self._pick(node, rows, rule, None)
        return self._choices[key]

    def match(self, node: TensorNode, rows: int) -> int | None:
        """The policy's rule for a node; None where its defaults hold."""
        rule = self.policy.match(node, rows, self.offers.device)
        self._matched.add(rule)
        return rule

    def check_names(self) -> None:
        """PolicyError for a kernel that nobody has, which the policy names where some node was meant."""
        offers = self.offers
        if self.locked is None:
            for finding in unknown_kernels(self.policy, offers.registry, offers.device, offers.names, self._matched):
                if finding.weight == "error":
                    raise finding.error(self.policy)

    def _locked(self, node: TensorNode, rows: int) -> Choice | None:
        """What a lock has for a node, with its kernel; PlanError where that is not offered any more."""
        top = min((top for top in self.locked or () if top >= rows), default=0)
        locked = (self.locked or {}).get(top, {}).get(node.name)
        if locked is None or (node.name, locked.name) in self.banned:
            return None
        offer = self.offers.of(node, top)
        if locked.name not in offer.kernels:
            absence = self._absence(locked.name, locked.backend, offer)
            raise PlanError(
                f"the plan was locked with {locked.name} for {node.name}, which is not to be had: {absence.reason}",
                node=node.name,
                kernel=locked.name,
            )
        return Choice(**locked.told(), kernel=offer.kernels[locked.name])

    def _pick(self, node: TensorNode, rows: int, rule: int | None, own: Refuse | None) -> Choice:
        offer = self.offers.of(node, rows)
        rejected: dict[str, Rejection] = {}
        picked: tuple[str, str, str] | None = None
        for name, reason, asked in self._order(rule, offer):
            if name in rejected or (picked and picked[0] == name):
                continue
            refusal = self.refusal(name, node, rule, offer) or (own(name, offer.kernels[name]) if own else None)
            if refusal is not None:
                rejected[name] = Rejection(name, refusal.reason, refusal.kind)
            elif picked is None:
                picked = (name, reason, asked)
            else:
                rejected[name] = Rejection(name, f"{picked[0]} comes first in {picked[1]}", "outranked")
        if picked is None:
            self.check_names()
            said = self._nobody(node.at(rows), rule, list(rejected.values()))
            line = self.policy.line("defaults") if rule is None else self.policy.line("rule", rule)
            raise PlanError(said, file=self.policy.source, line=line, node=node.name)
        name, reason, asked = picked
        on_error = self.policy.on_error(rule)
        losers = tuple(rejected.values())
        return Choice(name, reason, losers, rule, asked, on_error, kernel=offer.kernels[name])

    def _order(self, rule: int | None, offer: Offer) -> Iterator[tuple[str, str, str]]:
        """Candidates in order of preference, each with its reason and the policy's words; refused ones among them."""
        document = self.policy.document
        if rule is not None:
            for asked in document.rule[rule].use:
                yield from ((full, self.policy.where(rule), asked) for full in _expand(asked, offer))
            if document.rule[rule].on_unsupported == "error":
                return
        # Installed backends that the defaults do not name come last, by name; broken ones too, so that they are shown.
        for asked in (*document.defaults.use, *self.offers.registry.backends):
            yield from ((full, self.policy.where(None), asked) for full in _expand(asked, offer))

    def refusal(self, name: str, node: TensorNode, rule: int | None, offer: Offer) -> Declined | None:
        """Why a candidate cannot have a node of this kind, or None where it can."""
        forbidden = self.policy.document.forbid
        backend = name.partition(":")[0]
        if name in forbidden or backend in forbidden:
            return Declined("the policy forbids it", "forbidden")
        if name not in offer.kernels:
            return self._absence(name, backend, offer)
        kernel = offer.kernels[name]
        if (fault := unreadable(kernel, node)) is not None:
            return fault
        if not self.within_budget(kernel, rule):
            budget = self.policy.max_error(rule)
            return Declined(f"its error bound {kernel.precision:g} is over the budget {budget:g}", "over budget")
        return None

    def within_budget(self, kernel: Kernel, rule: int | None) -> bool:
        """Whether a kernel's bound is within a rule's error budget."""
        budget = self.policy.max_error(rule)
        return budget is None or kernel.precision <= budget

    def _absence(self, name: str, backend: str, offer: Offer) -> Declined:
        """Why a kernel that was asked for by name was not offered."""
        if (declined := offer.declined.get(name) or offer.declined.get(backend)) is not None:
            return declined
        if backend not in self.offers.registry.backends:
            return Declined(f"not installed: pip install kernelmux-{backend}", "missing dependency")
        if fault := self.offers.registry.backends[backend].fault:
            return Declined(f"quarantined: {fault}", "not offered")
        return Declined(f"{backend} does not offer it for this node", "not offered")

    def own_refusal(self, node: TensorNode, held: Held | None, exact: bool) -> Refuse | None:
        """What rules a kernel out for this very node, not for its kind: it has raised, or packs one copy too many."""
        limit = self.policy.document.weights.copies
        bans = {kernel for name, kernel in self.banned if name == node.name}
        if not bans and (limit is None or held is None or not node.weights):
            return None

        def refuse(name: str, kernel: Kernel) -> Declined | None:
            if name in bans:
                return Declined("it raised in a walk", "raised")
            form = packed_form(node, name, kernel) if limit is not None and held is not None else None
            if form is None or limit is None or held is None:
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
            f"no kernel takes {node.name} ({node.op} of {shapes}) on {self.offers.device.kind}, "
            f"by {self.policy.where(rule)}: {refusals}"
        )


def _expand(name: str, offer: Offer) -> list[str]:
    """A backend's kernels, offered first and refused after; or the one kernel that is named."""
    if ":" in name:
        return [name]
    offered = [full for full in offer.kernels if full.startswith(f"{name}:")]
    return offered + [full for full in offer.declined if full.partition(":")[0] == name] or [name]
