"""`kernelmux chat`: lines in, answers out, the cache kept between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kernelmux.cli.common import (
    CachePacked,
    ChatTemplatePath,
    DeviceName,
    DocumentsPath,
    Exact,
    LockedPlan,
    MaxRows,
    MinP,
    ModelPath,
    ParseSpecial,
    PolicyPath,
    RepetitionPenalty,
    Seed,
    Strict,
    Temperature,
    ToolsPath,
    TopK,
    TopP,
    Use,
    Verbose,
    asked_sampling,
    chosen_plan,
    open_asked,
    refuse_beside_plan,
    tell_cache,
    tell_replaced,
    traced,
)
from kernelmux.cli.observe import Observing, WatchdogSeconds
from kernelmux.cli.output import say, tell
from kernelmux.cli.progress import ProgressBar
from kernelmux.cli.prompt import asked_options, said_lines, tell_unread
from kernelmux.errors import ModelError, named

if TYPE_CHECKING:
    from kernelmux.run.chat import Chat

USUAL_CONTEXT = 4096
"""Tokens that a chat holds unless told, where the model holds more."""


@traced
def chat(
    model: ModelPath,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="What the model is told first.")] = "",
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
    device: DeviceName = "cpu",
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help=f"Tokens that the chat holds, else {USUAL_CONTEXT} or the model's own."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    cache_packed: CachePacked = False,
    watchdog: WatchdogSeconds = None,
    verbose: Verbose = False,
) -> None:
    """Talk with a model: each line of stdin is a message. Ctrl-C ends an answer, Ctrl-D the chat.

    Where the cache is full, the oldest messages are left out.
    """
    from kernelmux.contract.device import start_device
    from kernelmux.run.chat import Chat

    start_device(device)
    refuse_beside_plan(locked, policy, exact, use, max_rows)
    sampling = asked_sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    options = asked_options(parse_special, chat_template, tools, documents)
    with ProgressBar() as bar:
        bar.begin("opening the model")
        opened = open_asked(model, None, device, context)
        tell_unread(opened, options)
        bar.begin("planning")
        made = chosen_plan(opened, locked, policy, exact, use, device, strict, max_rows)
        tokens = context or min(USUAL_CONTEXT, opened.source.shape.context)
        talk = Chat(opened, made, sampling, tokens, max_tokens, system, cache_packed=cache_packed, options=options)
    try:
        with Observing(watchdog=watchdog).over(talk.session):
            with ProgressBar() as bar:
                for progress in talk.prepare():
                    bar.show(progress)
            for line in said_lines():
                _answer(talk, line, verbose)
    finally:
        tell_replaced(talk.session)
        tell_cache(talk.session.packed_cache)


def _answer(talk: Chat, line: str, verbose: bool) -> None:
    """Streams the answer to a line; one that does not fit is told of."""
    answer = talk.ask(line)
    try:
        for piece in answer:
            tell(piece, nl=False)
    except KeyboardInterrupt:
        answer.close()
    except ModelError as error:
        say(f"kernelmux: {named(error)}", err=True)
        return
    tell()
    if talk.dropped:
        say(f"the chat was full: {talk.dropped} of its messages, the oldest, are left out", err=True)
    if talk.cut:
        say("the answer was cut: it may go on with more --max-tokens, or --context", err=True)
    if verbose:
        say(f"{talk.kept} tokens of the chat were in the cache", err=True)
