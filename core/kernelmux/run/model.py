"""The Python API: a model that plans, answers and gives logits."""

from __future__ import annotations

import operator
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from kernelmux.contract import registry
from kernelmux.contract.device import Device, find_device
from kernelmux.contract.packed import PackedWeights
from kernelmux.contract.packed_cache import PackedCache
from kernelmux.errors import ModelError, PlanError, PolicyError, check_type
from kernelmux.graph.graph import Graph
from kernelmux.measure.predict import CONTEXT
from kernelmux.models import Source, open_model, open_random
from kernelmux.models.chat import ChatTemplate, stated_template
from kernelmux.plan.lock import read_lock
from kernelmux.plan.plan import MAX_ROWS, Plan, make_plan
from kernelmux.policy.policy import Policy, default_policy, read_policy
from kernelmux.run.generate import generate
from kernelmux.run.host import plainly
from kernelmux.run.ladder import step_rows
from kernelmux.run.progress import Progress
from kernelmux.run.sampling import Sampling
from kernelmux.run.session import Session

if TYPE_CHECKING:
    import torch

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages (`{"role": ..., "content": ...}`)."""
USUAL_TOKENS = 128
"""Of an answer at most, unless told."""
QUIET = 1.0
"""Seconds after which somebody at a terminal is told what an answer waits for."""
PREPARING = "kernelmux: packing weights and compiling kernels before the first "


@plainly
def load(path: str | Path, context: int = 0) -> Model:
    """Opens a GGUF file, or a folder of Hugging Face's; its weights stay on disk until a plan packs them.

    `context` tokens are to be held: a model that differs for short and for long contexts (phi3 by its longrope) is else
    the short one. ModelError says what is wrong with the file.
    """
    check_type(path, str | os.PathLike, "a model is the path of a file or of a folder", ModelError)
    check_type(context, SupportsIndex, "context is a whole number", ModelError)
    return Model(open_model(path, context))


@plainly
def load_random(asked: str, device: str = "cpu", context: int = 0) -> Model:
    """A known shape with random weights, as `llama-8b:Q4_K_M`, drawn on the torch device that will use them.

    `context` is as in `load`.
    """
    check_type(asked, str, "a random model is its name, as 'llama-8b:Q4_K_M'", ModelError)
    registry.current()  # A backend may bring the format.
    return Model(open_random(asked, device, context))


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt becomes token ids."""

    parse_special: bool = False
    """Takes control tokens that are written in a text, or in messages, for what they are: else they are text."""
    chat_template: str | None = None
    """For messages, in place of the file's own."""
    tools: Sequence[Any] | None = None
    """What the template is to tell the model that it may call, as JSON has it; templates differ in what they expect."""
    documents: Sequence[Any] | None = None


PROMPT_OPTIONS = PromptOptions()


@dataclass(eq=False)
class Model:
    """An open model: its graph, its tokenizer, and the weights that its plans have packed."""

    source: Source
    _packed: dict[Device, PackedWeights] = field(default_factory=dict, repr=False)
    _recent: PackedWeights | None = field(default=None, repr=False)
    """What the last `generate` or `forward` packed: the next one finds it, unless it is for another plan."""
    _templates: dict[str, ChatTemplate] = field(default_factory=dict, repr=False)

    @property
    def graph(self) -> Graph:
        return self.source.graph

    @plainly
    def locked_plan(
        self, path: str | Path, device: str | Device = "cpu", *, strict: bool = False, written: bytes | None = None
    ) -> Plan:
        """The plan of a lock file; PlanError where graph, kernels or device are not those that it was locked with.

        `strict` is as in `plan`, of the notes that were locked; `written` what the file has, where it was read already.
        """
        check_type(path, str | os.PathLike, "a lock file is a path", PlanError)
        made = read_lock(path, self.graph, registry.current(), _device(device), written)
        return _strictly(made, str(path)) if strict else made

    @plainly
    def plan(
        self,
        policy: Policy | str | Path | None = None,
        *,
        use: str | Iterable[str] = (),
        device: str | Device = "cpu",
        max_rows: int = MAX_ROWS,
        context: int = CONTEXT,
        strict: bool = False,
    ) -> Plan:
        """Chooses every node's kernel by a policy file, `exact`, or the default one; `use` (`OP=KERNEL`) outranks them.

        Where `auto` chooses, then for steps of up to `max_rows` rows, and for `context` cached tokens of each sequence.
        `strict` makes an error, a PlanError, of whatever the plan's notes have to say, and in a walk of a kernel that
        raises, whatever the policy's `on_error` is.
        A Device that is only described (`described_device`) can be planned for, and not run on.
        """
        for name, given in (("max_rows", max_rows), ("context", context)):
            check_type(given, SupportsIndex, f"{name} is a whole number", PlanError)
        if policy is None:
            policy = default_policy()
        elif not isinstance(policy, Policy):
            check_type(policy, str | os.PathLike, "a policy is a file's path, 'exact' or a Policy", PolicyError)
            policy = read_policy(policy)
        made = make_plan(
            self.graph, policy.with_use(use), registry.current(), _device(device), max_rows, context=context
        )
        return _strictly(made, policy.source) if strict else made

    def encode(self, prompt: Prompt, options: PromptOptions = PROMPT_OPTIONS) -> list[int]:
        """The prompt's token ids; messages go through the chat template.

        Control tokens that are written in a text, or in messages, are text unless the options ask for them.
        """
        check_type(options, PromptOptions, "options are PromptOptions", ModelError)
        if isinstance(prompt, str):
            return self._encoded(prompt, parse_special=options.parse_special)
        items = _items(prompt)
        messages = [item for item in items if isinstance(item, Mapping)]
        if not messages:
            return self._checked_ids(items)
        if len(messages) < len(items):
            raise ModelError("a prompt is text, token ids or chat messages, not a mixture of them")
        text, quote = self.rendered(messages, options)
        # The template writes the special tokens itself.
        return self._encoded(text, add_special=False, parse_special=True, quote=quote)

    def _encoded(self, text: str, **asked: Any) -> list[int]:
        ids = self.source.tokenizer.encode(text, **asked)
        # A folder's tokenizer may have more tokens than its model.
        return ids if max(ids, default=0) < self.source.shape.vocab else self._checked_ids(ids)

    def render(self, messages: Sequence[Mapping[str, Any]], options: PromptOptions = PROMPT_OPTIONS) -> str:
        """The text of chat messages by the template, with the opening of the answer; ModelError where there is none."""
        text, quote = self.rendered(messages, options)
        return text.replace(quote, "") if quote else text

    def rendered(self, messages: Sequence[Mapping[str, Any]], options: PromptOptions) -> tuple[str, str]:
        """The same with marks in what messages write as control tokens, and the mark (`ChatTemplate.render`)."""
        template = options.chat_template
        if template is None:
            template = stated_template(self.source.file.metadata, tools=options.tools is not None)
        if template is None:
            raise ModelError(f"{self.source.file.path}: the file has no chat template; give one, or the prompt as text")
        if template not in self._templates:
            self._templates[template] = ChatTemplate(template, self.source.tokenizer)
        return self._templates[template].render(
            messages, tools=options.tools, documents=options.documents, quoted=not options.parse_special
        )

    def session(self, plan: Plan, tokens: int, sequences: int = 1, *, cache_packed: bool = False) -> Session:
        """A cache of `tokens` tokens for up to `sequences` sequences at once, walked by `plan`.

        Sessions share the weights that they pack alike, and let go of them when the last one is dropped. PlanError
        where the plan is for another graph than the model's, CapacityError where there is no room for what is asked.
        `cache_packed` keeps on disk what the session packs, and maps what one of an earlier process kept; what is to be
        told of it (a damaged file, a full disk) are the `notes` of the session's `packed_cache`.
        """
        self._check_plan(plan)
        for name, given in (("tokens", tokens), ("sequences", sequences)):
            check_type(given, SupportsIndex, f"{name} is a whole number", PlanError)
        file, device = self.source.file, plan.device
        packed = self._packed.setdefault(device, PackedWeights(file.weights, device))
        cache = PackedCache(file.weights, device, file.path, file.stamp) if cache_packed else None
        return Session(plan, packed.holder(cache), tokens, sequences)

    def _kept_session(self, plan: Plan, tokens: int, cache_packed: bool = False) -> Session:
        """A session for one answer, whose packed weights the model keeps for the next one."""
        session = self.session(plan, tokens, cache_packed=cache_packed)
        packed = session.walker.packed
        if self._recent is not None and self._recent.device == plan.device:
            packed.adopt(self._recent, plan.packed_forms)
        self._recent = packed
        return session

    def generate(
        self,
        prompt: Prompt,
        plan: Plan | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        cache_packed: bool = False,
        options: PromptOptions = PROMPT_OPTIONS,
    ) -> Generation:
        """An answer to iterate over, as pieces of text. ModelError for a prompt that the model cannot hold.

        Of a folder without a tokenizer a prompt is token ids, and so is the text, as numbers.
        Unless told it has up to 128 tokens, or as many as the model holds after the prompt.
        """
        if max_tokens is not None:
            check_type(max_tokens, SupportsIndex, "max_tokens is a whole number", ModelError)
            if max_tokens < 1:
                raise ModelError(f"max_tokens is at least 1, not {max_tokens}")
        ids = self.encode(prompt, options)
        if max_tokens is None:
            max_tokens = max(1, min(USUAL_TOKENS, self.source.shape.context - len(ids) + 1))
        # The last one is drawn, and not read any more.
        self._check_length(ids, max_tokens - 1)
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
        plan = self.plan() if plan is None else plan
        session = self._kept_session(plan, len(ids) + max_tokens, cache_packed)
        return Generation(self.source, session, ids, sampling, max_tokens)

    def forward(self, ids: Sequence[int], plan: Plan | None = None) -> torch.Tensor:
        """Logits [len(ids), vocabulary] of every position, in float32."""
        ids = self._checked_ids(ids)
        self._check_length(ids, 0)
        session = self._kept_session(self.plan() if plan is None else plan, len(ids))
        with _telling("logits"):
            for _ in session.prepare_logits(len(ids)):
                pass
        return session.feed(session.open(), ids, all_logits=True)

    def _check_plan(self, plan: object) -> None:
        if not isinstance(plan, Plan):
            raise PlanError(
                f"a plan is what model.plan() returns, not {plan!r:.80}: for a policy file pass plan=model.plan(FILE), "
                "for a lock file plan=model.locked_plan(FILE)"
            )
        # A policy may store the cache otherwise than the model's own graph does.
        own = self.graph.with_cache_format(plan.policy.cache_format(plan.device))
        # Of graphs that are equal no digest is made: it takes longer than a step.
        if plan.graph != own and plan.graph.digest != own.digest:
            raise PlanError(
                f"the plan is for {plan.graph.name} (graph {plan.graph.digest}), the model is {own.name} "
                f"(graph {own.digest}): make one with this model's plan()"
            )

    def _checked_ids(self, ids: Sequence[object]) -> list[int]:
        vocab = self.source.shape.vocab
        checked = []
        for id in _items(ids):
            if not hasattr(id, "__index__"):
                raise ModelError(f"a prompt is text, token ids or chat messages, not a list with {id!r:.40}")
            checked.append(operator.index(id))
            if not 0 <= checked[-1] < vocab:
                raise ModelError(f"token id {id} is not in the vocabulary of {vocab}")
        return checked

    def _check_length(self, ids: Sequence[int], new_tokens: int) -> None:
        context = self.source.shape.context
        if not ids:
            raise ModelError("the prompt has no tokens; give at least one")
        if (wanted := len(ids) + new_tokens) <= context:
            return
        follow = f" and {new_tokens + 1} are to follow" if new_tokens else ""
        told = f"the prompt has {len(ids)} tokens{follow}, the model holds {context}: shorten the prompt"
        if len(ids) <= context:
            told += f", or ask for up to {context - len(ids) + 1} (--max-tokens)"
        if wanted <= self.source.shape.longest:
            told += f", or open it for longer contexts (--context {wanted}, or load(path, context={wanted}))"
        raise ModelError(told)


def _strictly(plan: Plan, source: str) -> Plan:
    if plan.notes:
        raise PlanError(f"a plan that is strict has no notes: {'; '.join(plan.notes)}", file=source)
    return replace(plan, strict=True)


def _items(prompt: Iterable[Any]) -> list[Any]:
    """The ids or messages of a prompt that is no text; ModelError for bytes, which would each be taken for an id."""
    kinds = () if isinstance(prompt, bytes | bytearray) else Iterable
    check_type(prompt, kinds, "a prompt is text, token ids or chat messages", ModelError)
    return list(prompt)


def _device(asked: str | Device) -> Device:
    check_type(asked, str | Device, "a device is its name, as 'cuda:0', or a Device", PlanError)
    return find_device(asked) if isinstance(asked, str) else asked


@contextmanager
def _telling(awaited: str) -> Iterator[None]:
    """A line on stderr where what a person waits for at a terminal takes long; none after `prepare` has been walked."""
    timer = threading.Timer(QUIET, print, [PREPARING + awaited], {"file": sys.stderr})
    timer.daemon = True
    if sys.stderr is not None and sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass(eq=False)
class Generation:
    """A streamed answer: iterating over it runs the model; the counts and times are those of what has run so far."""

    source: Source
    session: Session
    prompt_ids: Sequence[int]
    sampling: Sampling
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0

    def prepare(self) -> Iterator[Progress]:
        """Does all that must be done before the first step, step by step: packing, compiling, binding, capturing."""
        prompt = step_rows(len(self.prompt_ids), self.session.plan.max_rows)
        rows = {*prompt, 1} if self.max_tokens > 1 else prompt
        yield from self.session.prepare(rows, self.sampling)

    def __iter__(self) -> Iterator[str]:
        with _telling("answer; `prepare()` tells how far it is"):
            for _ in self.prepare():
                pass
        self.ids, self.prompt_seconds, self.decode_seconds = [], 0.0, 0.0
        decoder = self.source.decoder
        stream = decoder.stream(after=self.prompt_ids[-1])
        started = time.perf_counter()
        for token in generate(self.session, self.prompt_ids, self.sampling, decoder.end_ids, self.max_tokens):
            now = time.perf_counter()
            if self.ids:
                self.decode_seconds += now - started
            else:
                self.prompt_seconds = now - started
            self.ids.append(token)
            if token not in decoder.end_ids and (text := stream.push(token)):
                yield text
            started = time.perf_counter()
        if rest := stream.flush():
            yield rest

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second."""
        return len(self.prompt_ids) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0
