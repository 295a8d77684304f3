"""`kernelmux bench`: single kernels beside each other and the machine's ceilings; a model's prompts and decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.command import Command
from kernelmux.cli.common import (
    CachePacked,
    DeviceName,
    Exact,
    Json,
    MaxRows,
    OptionalModelPath,
    PolicyPath,
    RandomModel,
    SaveJson,
    Strict,
    Temperature,
    TopP,
    Use,
    asked_policy,
    make_plan,
    open_asked,
    refuse_overwriting,
    row_counts,
)
from kernelmux.cli.observe import Annotating, Observing, ShadowBound, Shadowed, WatchdogSeconds
from kernelmux.cli.output import print_json, print_table
from kernelmux.cli.progress import ProgressBar
from kernelmux.errors import KernelmuxError, contained, named, nearest

if TYPE_CHECKING:
    from kernelmux.contract.device import Ceilings, Device
    from kernelmux.measure.works import Work

bench = typer.Typer(
    name="bench", help="Measure kernels and models on this machine.", no_args_is_help=True, add_completion=False
)


@bench.command(cls=Command)
def ops(
    op: Annotated[list[str] | None, typer.Option("--op", metavar="OP", help="Only this op; may be repeated.")] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", metavar="NAME", help="Only this kernel, or backend; may be repeated."),
    ] = None,
    shape: Annotated[
        str, typer.Option("--shape", metavar="SHAPE:FORMAT", help="A random model's nodes, or NxK:FORMAT, a mul_mat.")
    ] = "llama-8b:bf16",
    m: Annotated[str, typer.Option("--m", metavar="M,M", help="Row counts; from 128 a prompt, else decoding.")] = "1",
    context: Annotated[int, typer.Option("--context", min=1, help="Cached tokens of decoding sequences.")] = 512,
    activations: Annotated[
        str | None, typer.Option("--activations", metavar="FORMAT", help="Preferred: bf16 on CUDA, f32 on the CPU.")
    ] = None,
    device: DeviceName = "cpu",
    json: Json = False,
    save: SaveJson = None,
) -> None:
    """Time every kernel that takes a node, side by side, as shares of what the machine can do."""
    from kernelmux.contract.device import find_device
    from kernelmux.graph.formats import lookup
    from kernelmux.measure.ceilings import measure_ceilings

    refuse_overwriting("--save", save)
    target = find_device(device)
    stored = lookup(activations or target.platform.activations).name
    works = _works(shape, op, row_counts(m), context, stored)
    ceilings = measure_ceilings(target)
    rows, notes = _timed(works, kernel or [], target, stored, ceilings)
    gemm = ", ".join(f"{format} {rate / 1e12:.1f} TFLOP/s" for format, rate in ceilings.gemm.items())
    notes.insert(0, f"Ceilings: copy {ceilings.copy / 1e9:.0f} GB/s, read {ceilings.read / 1e9:.0f} GB/s, GEMM {gemm}.")
    _show(f"Kernels, {shape}", target, target.platform.method, rows, notes, json, save)


@bench.command(cls=Command)
def model(
    model: OptionalModelPath = None,
    random: RandomModel = None,
    policy: PolicyPath = None,
    exact: Exact = False,
    use: Use = None,
    strict: Strict = False,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")] = 512,
    context: Annotated[int, typer.Option("--context", min=1, help="Cached tokens of each sequence.")] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences decoded at once.")] = 1,
    decode: Annotated[int, typer.Option("--decode", min=1, help="Steps decoded.")] = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_rows: MaxRows = None,
    cache_packed: CachePacked = False,
    shadow: Shadowed = None,
    shadow_bound: ShadowBound = None,
    watchdog: WatchdogSeconds = None,
    annotate: Annotating = False,
    device: DeviceName = "cpu",
    json: Json = False,
    save: SaveJson = None,
) -> None:
    """Time prompts and decoding of a model, and what Python and memory they cost."""
    from kernelmux.graph.formats import human_bytes
    from kernelmux.plan.plan import MAX_ROWS
    from kernelmux.run.bench import DECODES, PROMPTS, Load, time_model
    from kernelmux.run.replaced import told
    from kernelmux.run.sampling import Sampling

    refuse_overwriting("--save", save, model=model, policy=policy)
    observing, longest = Observing(False, shadow, shadow_bound, watchdog, annotate), max(prompt, context + decode)
    load = Load(prompt, context, batch, decode, Sampling(temperature, top_p))
    with ProgressBar() as bar:
        bar.begin("opening the model")
        opened = open_asked(model, random, device, longest)
    asked = asked_policy(policy, exact)
    with ProgressBar() as bar:
        bar.begin("planning")
        plan = make_plan(opened, asked, use, device, strict, max_rows=max(max_rows or MAX_ROWS, batch))
        timed = time_model(opened, plan, load, bar.show, cache_packed, observing.over)
    method = f"policy {plan.policy.source}; medians of {PROMPTS} prompts and {DECODES} times {decode} steps"
    notes = [f"Memory: {', '.join(f'{name} {human_bytes(nbytes)}' for name, nbytes in timed.memory.items())}."]
    _show(
        opened.graph.name,
        plan.device,
        method,
        timed.rows(),
        [*notes, *timed.notes, *told(timed.replaced)],
        json,
        save,
        observing.described(),
    )
    observing.tell()


def _works(shape: str, op: list[str] | None, counts: Sequence[int], context: int, cache_format: str) -> list[Work]:
    """The nodes that `--shape` and `--op` name, at every row count."""
    from kernelmux.contract import registry
    from kernelmux.measure.works import matrix_work, model_works
    from kernelmux.models import open_random

    registry.current()  # A backend may bring the format.
    sizes, _, format = shape.partition(":")
    n, cross, k = sizes.partition("x")
    if cross and n.isdigit() and k.isdigit():
        if op not in (None, ["mul_mat"]):
            raise KernelmuxError(f"--shape {shape} is a mul_mat's; for other ops name a model, as llama-8b:bf16")
        return [matrix_work(int(n), int(k), format or "bf16", m) for m in counts]
    graph = open_random(shape, option="--shape").graph.with_cache_format(cache_format)
    asked = op or list(dict.fromkeys(node.op for node in graph.ops))
    return [work for m in counts for work in model_works(graph, asked, m, context)]


def _timed(
    works: Sequence[Work], asked: Sequence[str], device: Device, activations: str, ceilings: Ceilings
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each kernel that runs, and why others do not; an error where that is none."""
    from kernelmux.contract import registry
    from kernelmux.measure.ops import find_kernels, random_weights, time_kernel

    def wanted(name: str) -> bool:
        return not asked or name in asked or name.partition(":")[0] in asked

    weights = random_weights(works, device)
    rows: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    found = [(work, *find_kernels(work, registry.current(), device)) for work in works]
    names = {name for _, offered, declined in found for name in (*offered, *declined)}
    known = {*names, *(name.partition(":")[0] for name in names)}
    if unknown := [name for name in asked if name not in known]:
        raise KernelmuxError(f"--kernel {unknown[0]}: unknown{nearest(unknown[0], known)}")
    for work, offered, declined in found:
        refused = {name: refusal.reason for name, refusal in declined.items() if wanted(name)}
        notes.update({f"{name} does not take {work.label}: {reason}.": None for name, reason in refused.items()})
        for name, kernel in offered.items():
            if not wanted(name):
                continue
            try:
                rows.append(time_kernel(work, name, kernel, weights, activations).row(ceilings))
            except BaseException as error:
                # One that fails must not cost the figures of the others.
                notes[f"{name} at {work.label}, m = {work.m}: {named(contained(error))}"] = None
    if not rows:
        raise KernelmuxError(f"no kernel was timed: {' '.join(notes) or 'the model has no such node'}")
    return rows, list(notes)


def _show(
    title: str,
    device: Device,
    method: str,
    rows: list[dict[str, Any]],
    notes: list[str],
    json: bool,
    save: Path | None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """A table or the document on stdout, notes on stderr, and the document, with `more`, where it was asked for."""
    from kernelmux.measure.report import make_report, save_report

    report = {**make_report(title, device, method, rows, notes), **(more or {})} if json or save else {}
    cells = [[" to ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row.values()] for row in rows]
    if json:
        print_json(report)
    else:
        print_table(list(rows[0]), cells, f"{title}: {method}")
    for note in notes:
        typer.echo(note, err=True)
    if save is not None:
        save_report(report, save)
