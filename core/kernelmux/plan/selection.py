"""Chooses one kernel for one node: the policy's order over what the backends offer, with a reason for everybody.

Enters: a node at a row count. Leaves: a Choice, or a PlanError that lists every refusal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kernelmux.contract.answers import Offer
from kernelmux.contract.kernel import Declined, Kernel
from kernelmux.contract.packed import Form, packed_form
from kernelmux.contract.record import Record
from kernelmux.errors import BackendError, PlanError
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.predict import CONTEXT, Prediction, Predictor
from kernelmux.measure.table import Tables
from kernelmux.plan.budget import default_budget
from kernelmux.plan.choice import Choice, Placed, Rejection
from kernelmux.plan.names import absent_names, unknown_kernels
from kernelmux.plan.offers import Offers
from kernelmux.policy.grammar import AUTO, PARTS, Rule
from kernelmux.policy.policy import Policy

LEAST_TIME = "least predicted time"
"""The reason of what `auto` chooses."""

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
    context: int = CONTEXT
    """Cached tokens of each sequence that decodes, for which times are predicted."""
    _choices: dict[tuple[int, int, int | None, str], Choice] = field(default_factory=dict)
    _predicted: dict[tuple[int, int, str], Prediction] = field(default_factory=dict)
    _matched: set[int | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        registry = self.offers.registry
        if not registry.working:
            faults = "".join(f"; {b.name}: {b.fault}" for b in registry.backends.values())
            raise BackendError(f"no backend is installed: pip install kernelmux-torch (or kernelmux-reference){faults}")
        if self.locked is None:
            for finding in absent_names(self.policy, registry, self.offers.device):
                if finding.weight == "error":
                    raise finding.error(self.policy)

    @cached_property
    def predictor(self) -> Predictor:
        """Tells how long a kernel is going to take."""
        return Predictor(self.offers.device, Tables(self.offers.device), self.context)

    @cached_property
    def record(self) -> Record:
        """Tells which kernels have failed their smoke cases on this machine."""
        return Record(self.offers.registry, self.offers.device)

    def predict(self, name: str, kernel: Kernel, node: TensorNode, rows: int) -> Prediction:
        """How long a kernel is going to take for nodes of a kind at a row count."""
        key = self.offers.kind(node), rows, name
        if key not in self._predicted:
            self._predicted[key] = self.predictor.of(kernel, node, rows)
        return self._predicted[key]

    def candidates(self, node: TensorNode, rows: int) -> list[tuple[str, Kernel]]:
        """The kernels that a node may get: all that `auto` may take, or the one that the policy names before it."""
        rule, offer = self.match(node, rows), self.offers.of(node, rows)
        for asked, place in self._words(rule):
            names, meant = self._named(asked, node, rule, offer), self._is_meant(asked, place)
            found = [name for name in names if self.refusal(name, node, rule, offer, asked, meant) is None]
            if found:
                return [(name, offer.kernels[name]) for name in (found if asked == AUTO else found[:1])]
        return []

    def choose(
        self, node: TensorNode, rows: int, held: Held | None = None, exact: bool = True, preferred: str = ""
    ) -> Choice:
        """The kernel for a node at a row count, where `auto` decides `preferred`; PlanError where none takes it.

        Unless `exact`, a form counts as held if one of its name is, stacked with whatever other weights: a fusion may
        still make it that one.
        """
        if (locked := self._locked(node, rows)) is not None:
            return locked
        rule = self.match(node, rows)
        own = self.own_refusal(node, held, exact)
        if own is not None:
            return self._pick(node, rows, rule, own, preferred)
        key = self.offers.kind(node), rows, rule, preferred
        if key not in self._choices:
            self._choices[key] = self._pick(node, rows, rule, None, preferred)
        return self._choices[key]

    def match(self, node: TensorNode, rows: int) -> int | None:
        """The policy's rule for a node; None where its defaults hold."""
        rule = self.policy.match(node, rows, self.offers.device)
        self._matched.add(rule)
        return rule

    def kind(self, node: TensorNode) -> tuple[int, tuple[int, ...]]:
        """What nodes have in common that get the same offers, and that rules match alike at any row count."""
        return self.offers.kind(node), tuple(index for index, rule in self._placed_rules if rule.is_at(node))

    @cached_property
    def _placed_rules(self) -> Sequence[tuple[int, Rule]]:
        rules = enumerate(self.policy.document.rule)
        return [(index, rule) for index, rule in rules if rule.node is not None or rule.layer is not None]

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

    def _pick(self, node: TensorNode, rows: int, rule: int | None, own: Refuse | None, preferred: str) -> Choice:
        offer = self.offers.of(node, rows)
        rejected: dict[str, Rejection] = {}
        picked: tuple[str, str, str] | None = None
        for name, reason, asked, meant in self._order(rule, offer, node, rows, preferred):
            if name in rejected or (picked and picked[0] == name):
                continue
            refusal = self.refusal(name, node, rule, offer, asked, meant)
            refusal = refusal or (own(name, offer.kernels[name]) if own else None)
            if refusal is not None:
                rejected[name] = Rejection(name, refusal.reason, refusal.kind)
            elif picked is None:
                picked = (name, reason, asked)
            elif asked == AUTO:
                told = self.predict(name, offer.kernels[name], node, rows)
                rejected[name] = Rejection(name, f"predicted {told}", "outranked")
            else:
                rejected[name] = Rejection(name, f"{picked[0]} comes first in {picked[1]}", "outranked")
        if picked is None:
            self.check_names()
            said = self._nobody(node.at(rows), rule, list(rejected.values()))
            line = self.policy.line("defaults") if rule is None else self.policy.line("rule", rule)
            raise PlanError(said, file=self.policy.source, line=line, node=node.name)
        name, reason, asked = picked
        on_error, kernel, losers = self.policy.on_error(rule), offer.kernels[name], tuple(rejected.values())
        predicted = self.predict(name, kernel, node, rows) if asked == AUTO else None
        return Choice(name, reason, losers, rule, asked, on_error, predicted=predicted, kernel=kernel)

    def _words(self, rule: int | None) -> Iterator[tuple[str, int | None]]:
        """The policy's words for a node in order of preference, each with the rule that it stands in."""
        document = self.policy.document
        if rule is not None:
            use = document.rule[rule].use
            yield from ((asked, rule) for asked in use if asked != PARTS)
            if PARTS in use or document.rule[rule].on_unsupported == "error":
                return
        # Installed backends that the defaults do not name come last; broken ones too, so that they are shown.
        yield from ((asked, None) for asked in (*document.defaults.use, *self.offers.registry.unnamed))

    def _order(
        self, rule: int | None, offer: Offer, node: TensorNode, rows: int, preferred: str
    ) -> Iterator[tuple[str, str, str, bool]]:
        """Candidates in order of preference, each with its reason, the policy's words, and whether somebody meant them.

        Refused ones are among them.
        """
        for asked, place in self._words(rule):
            if asked != AUTO:
                meant = self._is_meant(asked, place)
                names = self._named(asked, node, rule, offer)
                yield from ((full, self.policy.where(place), asked, meant) for full in names)
                continue
            reason = f"{LEAST_TIME}, by {self.policy.where(place)}"

            def slowness(name: str) -> tuple[bool, float, float, str]:
                kernel = offer.kernels[name]
                error = self.offers.fitness(kernel, node).error
                return name != preferred, self.predict(name, kernel, node, rows).us, error, name

            yield from ((full, reason, asked, False) for full in sorted(offer.kernels, key=slowness))

    def _is_meant(self, asked: str, place: int | None) -> bool:
        """Whether somebody named a backend or a kernel; nobody did what `auto` takes, or comes after the defaults."""
        named = place is not None or asked in self.policy.document.defaults.use
        return asked != AUTO and named and self.policy.is_asked_for(place)

    def refusal(
        self, name: str, node: TensorNode, rule: int | None, offer: Offer, asked: str, meant: bool = False
    ) -> Declined | None:
        """Why a candidate cannot have a node of this kind, or None where it can.

        Of what the policy has `asked` for, `auto` keeps to the default budget where there is no other. What failed its
        smoke cases on this machine only somebody can have who `meant` it.
        """
        forbidden = self.policy.document.forbid
        backend = name.partition(":")[0]
        if name in forbidden or backend in forbidden:
            return Declined("the policy forbids it", "forbidden")
        if name not in offer.kernels:
            return self._absence(name, backend, offer)
        kernel = offer.kernels[name]
        fitness = self.offers.fitness(kernel, node)
        if fitness.fault is not None:
            return fitness.fault
        if not meant and (failure := self.record.failure(node.op, name, kernel)):
            return Declined(failure, "failed")
        budget = self.policy.max_error(rule)
        if asked == AUTO:
            if fitness.overflows:
                return Declined("it takes float16, which ends at 65504, where the weights' own format goes on", "dtype")
            whose = "what the default takes" if budget is None else "the budget"
            most = default_budget(node) if budget is None else budget
            if fitness.error > most:
                return Declined(f"its error {fitness.error:g} is over {whose}, {most:g}", "over budget")
        elif not self.within_budget(kernel, rule):
            return Declined(f"its error bound {kernel.precision:g} is over the budget {budget:g}", "over budget")
        return None

    def within_budget(self, kernel: Kernel, rule: int | None) -> bool:
        """Whether a kernel's bound is within a rule's error budget."""
        budget = self.policy.max_error(rule)
        return budget is None or kernel.precision <= budget

    def is_open(self, node: TensorNode, rows: int) -> bool:
        """Whether the policy leaves a node to `auto`."""
        rule = self.match(node, rows)
        words = list(self._words(rule))
        if AUTO not in dict(words):
            return False
        offer = self.offers.of(node, rows)
        return all(
            self.refusal(name, node, rule, offer, asked, self._is_meant(asked, place)) is not None
            for asked, place in itertools.takewhile(lambda word: word[0] != AUTO, words)
            for name in self._named(asked, node, rule, offer)
        )

    def asks_for(self, name: str, node: TensorNode, rows: int, choice: Choice) -> bool:
        """Whether the policy would have a kernel rather than the choice, or `auto` decide, were it not refused."""
        if choice.asked == AUTO:
            return True
        rule, offer = self.match(node, rows), self.offers.of(node, rows)
        order = (full for asked, _ in self._words(rule) for full in self._named(asked, node, rule, offer))
        return name in itertools.takewhile(lambda full: full != choice.name, order)

    def _named(self, asked: str, node: TensorNode, rule: int | None, offer: Offer) -> Sequence[str]:
        """The kernels that a word of the policy stands for: the one that it names, a backend's, or for `auto` all.

        Of a backend's those come first that keep to the default budget, where the policy has none, and what is refused
        last: its fastest may be rough, and whoever wants that names it.
        """
        if ":" in asked:
            return [asked]
        if asked == AUTO:
            return list(offer.kernels)
        offered = [name for name in offer.kernels if name.startswith(f"{asked}:")]
        if self.policy.max_error(rule) is None:
            offered.sort(key=lambda name: self._is_rough(offer.kernels[name], node))
        return offered + [name for name in offer.declined if name.partition(":")[0] == asked] or [asked]

    def _is_rough(self, kernel: Kernel, node: TensorNode) -> bool:
        fitness = self.offers.fitness(kernel, node)
        return fitness.overflows or fitness.error > default_budget(node)

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
