"""`kernelmux run`: a prompt in, text out as it comes, then what it cost and who did it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.common import (
    CachePacked,
    ChatTemplatePath,
    Context,
    DeviceName,
    DocumentsPath,
    Exact,
    Json,
    LockedPlan,
    MaxRows,
    MaxTokens,
    MinP,
    OptionalModelPath,
    ParseSpecial,
    PolicyPath,
    RandomModel,
    RepetitionPenalty,
    Seed,
    Strict,
    Temperature,
    TokenIds,
    ToolsPath,
    TopK,
    TopP,
    Use,
    Verbose,
    asked_sampling,
    chosen_plan,
    open_asked,
    refuse_beside_plan,
    refuse_overwriting,
    refuse_together,
    tell_cache,
    tell_replaced,
    traced,
)
from kernelmux.cli.observe import Annotating, CheckNan, Observing, ShadowBound, Shadowed, WatchdogSeconds
from kernelmux.cli.output import line_width, print_json, tell
from kernelmux.cli.plan import capturing
from kernelmux.cli.progress import ProgressBar
from kernelmux.cli.prompt import asked_ids, asked_options, asked_prompt, tell_unread
from kernelmux.cli.stages import FIRST, Stages

if TYPE_CHECKING:
    from kernelmux.run.model import Generation, Prompt

ENOUGH = 4
"""Tokens of an answer from which on its speed tells something."""
FAR_SLOWER = 2.0
"""How many times slower than predicted an answer is told to be."""


@traced
def run(
    model: OptionalModelPath = None,
    random: RandomModel = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads stdin.", show_default=False),
    ] = None,
    ids: TokenIds = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    chat_template: ChatTemplatePath = None,
    tools: ToolsPath = None,
    documents: DocumentsPath = None,
    parse_special: ParseSpecial = False,
    policy: PolicyPath = None,
    exact: Exact = False,
    locked: LockedPlan = None,
    use: Use = None,
    strict: Strict = False,
    max_rows: MaxRows = None,
    context: Context = None,
    device: DeviceName = "cpu",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    capture: Annotated[
        Path | None,
        typer.Option("--capture-cases", metavar="FILE", help="Write the shapes that ran, for check --cases FILE."),
    ] = None,
    cache_packed: CachePacked = False,
    check_nan: CheckNan = False,
    shadow: Shadowed = None,
    shadow_bound: ShadowBound = None,
    watchdog: WatchdogSeconds = None,
    annotate: Annotating = False,
    timing: Annotated[bool, typer.Option("--timing", help="Say where the time to the first token went.")] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Answer a prompt, then say at what speed, and which kernels ran which ops."""
    from kernelmux.contract.device import start_device

    stages = Stages()
    stages.done("starting Python")
    start_device(device)
    refuse_overwriting("--capture-cases", capture, model=model, policy=policy, plan=locked)
    refuse_beside_plan(locked, policy, exact, use, max_rows)
    for option, path in {"--chat-template": chat_template, "--tools": tools, "--documents": documents}.items():
        if path is not None and not chat:
            raise typer.BadParameter("it is for a chat template: ask with --chat", param_hint=option)
    observing = Observing(check_nan, shadow, shadow_bound, watchdog, annotate)
    if (prompt is None) == (ids is None):
        raise typer.BadParameter("ask with one of the two", param_hint="'--prompt' / '-p' or '--ids'")
    refuse_together("--ids" if ids is not None else "", chat=chat, **{"parse-special": parse_special})
    said: Prompt = asked_prompt(prompt) if prompt is not None else asked_ids(ids or "")
    # Here, so that what they refuse is told before anything is opened.
    options = asked_options(parse_special, chat_template, tools, documents)
    asked_sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    with ProgressBar(stages) as bar:
        # By itself, so that it is told apart from what needs it first; not to say that there is no such file.
        if model is None or os.path.isfile(model):
            with bar.stage("importing torch"):
                import torch  # noqa: F401
        with bar.stage("opening the model"):
            opened = open_asked(model, random, device, context)
        tell_unread(opened, options)
        with bar.stage("planning"):
            made = chosen_plan(opened, locked, policy, exact, use, device, strict, max_rows)
        with bar.stage("reading the vocabulary"):
            answer = opened.generate(
                [{"role": "user", "content": said}] if chat else said,
                made,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                cache_packed=cache_packed,
                options=options,
            )
        try:
            with _capturing(answer, capture), observing.over(answer.session):
                for progress in answer.prepare():
                    bar.show(progress)
                bar.begin("reading the prompt")
                pieces, interrupted = _stream(answer, bar, echo=not json)
        finally:
            tell_replaced(answer.session)
    cache = answer.session.packed_cache
    try:
        told = stages.told(answer.prompt_seconds)
        if json:
            described = {**_describe(answer, "".join(pieces), interrupted), **observing.described()}
            print_json({**described, "timing": told})
        else:
            _print_statistics(answer, told if timing else {}, observing.observes)
        observing.tell()
    except KeyboardInterrupt:
        interrupted = True
    if interrupted and cache is not None:
        cache.background.stop()
    tell_cache(cache)
    if interrupted:
        raise typer.Exit(130)


def _capturing(answer: Generation, path: Path | None) -> AbstractContextManager[None]:
    if path is None:
        return nullcontext()
    from kernelmux.conformance.case_file import capture_cases

    return capture_cases(answer.session, path)


def _stream(answer: Generation, bar: ProgressBar, echo: bool) -> tuple[list[str], bool]:
    """The answer's pieces, printed as they come, the first one in the bar's place; and whether Ctrl-C ended it."""
    pieces: list[str] = []
    ended = False
    try:
        for text in answer:
            if echo:
                bar.close()
                tell(text, nl=False)
            elif not pieces:
                bar.begin("answering")
            pieces.append(text)
        ended = True
    except KeyboardInterrupt:
        return pieces, True
    finally:
        bar.close()
        # Where something raised before the first word there is no line to end.
        if echo and (pieces or ended):
            tell("")
    return pieces, False


def _print_statistics(answer: Generation, timing: Mapping[str, float], observed: bool) -> None:
    """To stderr, so that stdout holds the answer alone. What was `observed` is slower than predicted."""
    from kernelmux.plan.explain import run_summary
    from kernelmux.plan.table import wrapped

    plan = answer.session.plan
    stages = [f"{stage} {seconds:.2f} s" for stage, seconds in timing.items() if stage != FIRST]
    first = f"{FIRST} after {timing[FIRST]:.2f} s: {', '.join(stages)}" if timing else ""
    lines = [
        "",
        *(wrapped(first, line_width(), "  ") if timing else ()),
        *(_from_cache(answer) if timing else ()),
        f"prompt {_at_rate(len(answer.prompt_ids), answer.prompt_rate)}; "
        f"answer {_at_rate(len(answer.ids), answer.decode_rate)}",
        *run_summary(plan, line_width()),
        *capturing(plan),
    ]
    if not observed:
        lines += (part for line in _slower_than_predicted(answer) for part in wrapped(line, line_width(), "  "))
    for line in lines:
        typer.echo(line, err=True)


def _at_rate(tokens: int, rate: float) -> str:
    """So many tokens, and how many a second where that is known: of an answer of one it is not."""
    from kernelmux.graph.formats import human_count

    return human_count(tokens, "token") + (f", {rate:.1f} tokens/s" if rate else "")


def _from_cache(answer: Generation) -> Iterator[str]:
    """A line where packed weights are kept on disk."""
    from kernelmux.graph.formats import human_bytes

    if (cache := answer.session.packed_cache) is not None:
        packed = human_bytes(answer.session.plan.packed_bytes)
        yield f"packed weights {packed}, of which {human_bytes(cache.mapped_bytes)} came from the cache"


def _slower_than_predicted(answer: Generation) -> Iterator[str]:
    """A line where decoding took far longer than was predicted."""
    from kernelmux.plan.speed import Speeds

    if len(answer.ids) >= ENOUGH and answer.decode_rate:
        predicted = Speeds(answer.session.plan).at(1).tokens_per_second
        if (times := predicted / answer.decode_rate) > FAR_SLOWER:
            yield (
                f"decoding was {times:.1f} times slower than predicted: something else may be running; on an idle "
                "machine `kernelmux tune MODEL` measures what the prediction has wrong"
            )


def _describe(answer: Generation, text: str, interrupted: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from kernelmux.plan.explain import kernel_counts
    from kernelmux.plan.summary import summarise

    plan, cache = answer.session.plan, answer.session.packed_cache
    return {
        "text": text,
        "ids": answer.ids,
        "prompt_ids": list(answer.prompt_ids),
        "interrupted": interrupted,
        "prompt_tokens_per_second": answer.prompt_rate,
        "tokens_per_second": answer.decode_rate,
        "fingerprint": plan.fingerprint,
        "kernels": kernel_counts(plan.schedule(1, 1)),
        "summary": asdict(summarise(plan)),
        "packed_bytes": plan.packed_bytes,
        "packed_bytes_from_cache": 0 if cache is None else cache.mapped_bytes,
        "replaced": [asdict(each) for each in answer.session.replaced],
    }
