"""`kernelmux compare`: two plans of a model over the same texts, by token and by node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.common import Context, DeviceName, Json, ModelPath, SaveJson, noted, open_asked, refuse_overwriting
from kernelmux.cli.output import print_json, print_table, say, tell
from kernelmux.cli.progress import ProgressBar
from kernelmux.errors import ModelError, PolicyError, label

if TYPE_CHECKING:
    from kernelmux.debug.compare import Comparison, Perplexity
    from kernelmux.debug.nodes import NodeError
    from kernelmux.plan.plan import Plan
    from kernelmux.run.model import Model

SHOWN = 12
"""Nodes in the table, the worst first."""
Asked = Annotated[
    str,
    typer.Argument(
        metavar="PLAN",
        help="A policy or lock file, `default`, `exact`, OP=KERNEL (several: with ;), or a backend for all ops.",
        show_default=False,
    ),
]


def compare(
    model: ModelPath,
    first: Asked,
    second: Asked,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="A text, else one of this package.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Texts instead, one a line.", show_default=False)
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Tokens fed to the second plan at a time: 1 is how it decodes."),
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", min=0, metavar="N", help="Tokens over which nodes are compared; 0: none.")
    ] = 64,
    context: Context = None,
    device: DeviceName = "cpu",
    json: Json = False,
    save: SaveJson = None,
) -> None:
    """Hold a plan's results against another's: divergence, first parting, perplexity, and the error of each node."""
    from kernelmux.contract.device import start_device
    from kernelmux.debug.compare import compare as compare_plans
    from kernelmux.debug.nodes import ROWS, node_errors
    from kernelmux.measure.report import save_report
    from kernelmux.run.replaced import told

    start_device(device)
    refuse_overwriting("--save", save, model=model, text=text, prompts=prompts)
    with ProgressBar() as bar:
        bar.begin("opening the model")
        opened = open_asked(model, None, device, context)
        texts = _texts(opened, text, prompts)
        bar.begin("planning")
        plans = plan_of(opened, first, device), plan_of(opened, second, device)
        bar.begin("comparing tokens")
        compared = compare_plans(opened, *plans, texts, rows)
        bar.begin("comparing nodes")
        errors = node_errors(opened, *plans, texts[0][:nodes], min(rows or ROWS, ROWS)) if nodes else []
    document = _document((first, second), plans, compared, errors)
    for line in told(compared.replaced):
        say(f"kernelmux: {line}", err=True, fg="red", bold=True)
    if save is not None:
        save_report(document, save)
    if json:
        print_json(document)
    else:
        _show((first, second), compared, errors, _rows_told(plans[1], texts, rows, nodes))


def plan_of(model: Model, asked: str, device: str) -> Plan:
    """The plan that a word asks for; PolicyError where it is none."""
    from kernelmux.plan.lock import is_lock
    from kernelmux.policy.policy import SHIPPED

    path = Path(asked)
    if path.is_file() and is_lock(path, None):
        return noted(model.locked_plan(path, device), strict=False)
    if asked in SHIPPED or path.is_file() or path.suffix == ".toml":
        return noted(model.plan(asked, device=device), strict=False)
    uses = asked.split(";") if "=" in asked else [f"*={asked}"]
    try:
        return noted(model.plan(use=uses, device=device), strict=False)
    except PolicyError as error:
        known = f"a policy or lock file, {', '.join(SHIPPED)}, OP=KERNEL, or a backend"
        raise PolicyError(f"{label(asked)} is no plan ({known}): {error}") from error


def _texts(model: Model, text: Path | None, prompts: Path | None) -> list[list[int]]:
    from kernelmux.files import read_whole
    from kernelmux.run.divergence import prose

    if text is not None and prompts is not None:
        raise typer.BadParameter("it stands in place of --text: ask for one", param_hint="--prompts")
    path = text or prompts
    try:
        written = prose() if path is None else read_whole(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: no text that can be read: {error}", file=str(path)) from error
    texts = [line for line in written.splitlines() if line.strip()] if prompts is not None else [written]
    found = [ids for each in texts if (ids := model.encode(each))]
    if not found:
        raise ModelError(f"{path}: has no text in it", file=str(path))
    if max(map(len, found)) < 2:
        raise ModelError(f"{path}: has one token, and none that comes next", file=str(path))
    return found


def _document(
    asked: tuple[str, str], plans: Sequence[Plan], compared: Comparison, errors: Sequence[NodeError]
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "plans": [
            {"asked": word, "fingerprint": plan.fingerprint, "device": plan.device.device_class}
            for word, plan in zip(asked, plans, strict=True)
        ],
        "model": plans[0].graph.name,
        "tokens": asdict(compared),
        "nodes": [asdict(error) for error in errors],
    }


def _show(asked: tuple[str, str], compared: Comparison, errors: Sequence[NodeError], rows: Iterable[str]) -> None:
    text, position, nats = compared.worst
    say(f"{compared.tokens} tokens: {label(asked[1])} held against {label(asked[0])}")
    for line in rows:
        say(line)
    say(f"divergence {compared.divergence:.3g} nats a token; worst {nats:.3g}, {_place(text, position)}")
    say(f"likeliest token the same after {100 * compared.agreement:.2f} % of them")
    for word, perplexity in zip(asked, compared.perplexity, strict=True):
        say(f"perplexity {_told(perplexity)} by {label(word)}")
    if (parting := compared.parting) is not None:
        place = _place(parting.text, parting.position)
        say(f"they part first {place}, where the first plan is {parting.margin:.3g} ahead:")
        say(f"  ...{_end(parting.before)}")
        for word, continued in zip(asked, parting.continued, strict=True):
            say(f"  {label(word)}: {label(continued)}")
    worst = sorted((error for error in errors if error.own is not None), key=lambda error: -(error.own or 0.0))
    if worst:
        tell()
        headings = ("node", "op", "kernel", "own error", "stated", "gathered", "worst at")
        print_table(headings, [_row(error) for error in worst[:SHOWN]])


def _rows_told(plan: Plan, texts: Sequence[Sequence[int]], rows: int | None, nodes: int) -> Iterator[str]:
    """At how many rows all this was, which decides what kernels there were."""
    from kernelmux.debug.nodes import ROWS
    from kernelmux.graph.formats import human_count

    most = min(max(map(len, texts)), rows or plan.max_rows, plan.max_rows)
    compared = min(len(texts[0][:nodes]), rows or ROWS, ROWS)
    of_nodes = f", nodes at {human_count(compared, 'row')}" if nodes else ""
    yield f"in steps of {human_count(most, 'row')}{of_nodes}"
    if plan.bucket(1) != plan.bucket(most):
        yield f"not by the kernels of up to {human_count(plan.bucket(1), 'row')}, which decode: --rows 1 is by those"


def _place(text: int, position: int) -> str:
    return f"after token {position + 1}" + (f" of text {text + 1}" if text else "")


def _told(perplexity: Perplexity) -> str:
    return f"{perplexity.mean:.4g} ({perplexity.low:.4g} to {perplexity.high:.4g})"


def _end(text: str) -> str:
    return label(text[-60:])


def _row(error: NodeError) -> tuple[str, ...]:
    gathered = "" if error.gathered is None else f"{error.gathered:.2g}"
    place = "" if error.row is None else f"row {error.row}" + ("" if error.head is None else f", head {error.head}")
    return error.node, error.op, error.kernel, f"{error.own:.2g}", f"{error.stated:.2g}", gathered, place
