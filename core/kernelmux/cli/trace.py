"""`kernelmux trace`: where the time of a prompt and of decoding goes, and how much of it better kernels could gain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.common import (
    DeviceName,
    Exact,
    Json,
    OptionalModelPath,
    PolicyPath,
    RandomModel,
    SaveJson,
    Strict,
    Use,
    Verbose,
    asked_policy,
    make_plan,
    open_asked,
    refuse_overwriting,
    traced,
)
from kernelmux.cli.output import print_json, print_table, tell
from kernelmux.cli.progress import ProgressBar

if TYPE_CHECKING:
    from kernelmux.contract.device import Device
    from kernelmux.debug.trace import By, StepTrace, Trace

HEADINGS = ("nodes", "time", "% of step", "% of ceiling", "bound by", "gain at most, %")


@traced
def trace(
    model: OptionalModelPath = None,
    random: RandomModel = None,
    prompt: Annotated[
        int, typer.Option("--prompt", min=1, help="Tokens of the prompt, and of each sequence that decodes.")
    ] = 512,
    decode: Annotated[int, typer.Option("--decode", min=1, help="Steps decoded.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences decoded at once.")] = 1,
    policy: PolicyPath = None,
    exact: Exact = False,
    use: Use = None,
    strict: Strict = False,
    device: DeviceName = "cpu",
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page to read.")] = None,
    chrome: Annotated[
        Path | None, typer.Option("--chrome", metavar="FILE", help="Write events for chrome://tracing or Perfetto.")
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
    save: SaveJson = None,
) -> None:
    """Time every node of a prompt and of a decode step, against the step as it is run and the machine's ceilings."""
    from kernelmux.debug.trace import trace_model
    from kernelmux.debug.trace_page import trace_events, trace_html
    from kernelmux.files import write_whole
    from kernelmux.measure.report import save_report
    from kernelmux.plan.plan import MAX_ROWS

    refuse_overwriting("--html", html, model=model, policy=policy)
    refuse_overwriting("--chrome", chrome, model=model, policy=policy, page=html)
    refuse_overwriting("--save", save, model=model, policy=policy, page=html, events=chrome)
    asked = asked_policy(policy, exact)
    with ProgressBar() as bar:
        bar.begin("opening the model")
        opened = open_asked(model, random, device, prompt + decode)
        bar.begin("planning")
        plan = make_plan(opened, asked, use, device, strict, max(MAX_ROWS, prompt, batch))
        found = trace_model(opened, plan, prompt, decode, batch, bar.show)
    if html is not None:
        write_whole(html, trace_html(found))
    if chrome is not None:
        write_whole(chrome, trace_events(found))
    report = _document(found, plan.device) if json or save else {}
    if save is not None:
        save_report(report, save)
    if json:
        print_json(report)
        return
    for number, step in enumerate(found.steps):
        if number:
            tell()
        _print(step)


def _document(trace: Trace, device: Device) -> dict[str, Any]:
    """The trace, and what goes with a measurement: machine, versions, commit, date, method."""
    from kernelmux.measure.report import make_report

    method = "usual steps made launch by launch, beside the step as it is run; ceilings measured in the same run"
    notes = [str(step) for step in trace.steps]
    return {**make_report(f"Trace of {trace.model}", device, method, (), notes), **trace.told()}


def _print(step: StepTrace) -> None:
    tell(str(step))
    print_table(("op", *HEADINGS), _rows(step, "op"))
    tell()
    print_table(("kernel", *HEADINGS), _rows(step, "kernel"))


def _rows(step: StepTrace, by: By) -> Iterator[tuple[object, ...]]:
    from kernelmux.measure.predict import human_time

    for group in step.groups(by):
        yield (
            *(group.name, group.count, human_time(group.us), f"{100 * group.share:.1f}"),
            *(f"{100 * group.ceiling:.0f}", group.bound, f"{100 * group.gain:.1f}"),
        )
