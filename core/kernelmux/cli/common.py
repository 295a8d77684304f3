"""What several commands share: their arguments, the terminals, and tables."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from kernelmux.cli.output import say
from kernelmux.cli.progress import ProgressBar
from kernelmux.errors import KernelmuxError
from kernelmux.files import refuse_model

if TYPE_CHECKING:
    from kernelmux.contract.device import Device
    from kernelmux.contract.packed_cache import PackedCache
    from kernelmux.plan.plan import Plan
    from kernelmux.policy.policy import Policy
    from kernelmux.run.model import Model
    from kernelmux.run.sampling import Sampling
    from kernelmux.run.session import Session

ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A GGUF file, or a model's folder.", show_default=False)
]
OptionalModelPath = Annotated[
    Path | None, typer.Argument(metavar="[MODEL]", help="A GGUF file, or a model's folder.", show_default=False)
]
RandomModel = Annotated[
    str | None,
    typer.Option("--random", metavar="SHAPE:FORMAT", help="Random weights instead of a file, as llama-8b:Q4_K_M."),
]
PolicyPath = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="A policy file (TOML), `default` or `exact`.")
]
Exact = Annotated[bool, typer.Option("--exact", help="Float32's tokens: the policy `exact`, which a file may extend.")]
Use = Annotated[
    list[str] | None,
    typer.Option("--use", metavar="OP=KERNEL", help="Outranks the policy, as mul_mat=torch:f32; may be repeated."),
]
DeviceName = Annotated[
    str, typer.Option("--device", metavar="NAME", help="cpu, cuda, rocm or a package's kind; cuda:1 is the second.")
]
DeviceNameOrAs = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        show_default="cpu",
        help="cpu, cuda, rocm or a package's kind; cuda:1 is the second.",
    ),
]
DeviceAs = Annotated[
    str | None,
    typer.Option("--device-as", metavar="CLASS", help="Instead a device that may be absent: 'cuda sm_90 NVIDIA H200'."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="What is asked for and not used is an error, and a kernel that raises, too."),
]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest that reach this share.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also the traceback of whatever goes wrong.")]
MaxRows = Annotated[
    int | None,
    typer.Option("--max-rows", min=1, help="Token rows of the largest step, else 512: longer prompts take several."),
]
CachePacked = Annotated[
    bool, typer.Option("--cache-packed", help="Keep packed weights on disk, and map those that an earlier run kept.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for a script to read.")]
SaveJson = Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Also write the JSON there.")]
TokenIds = Annotated[str | None, typer.Option("--ids", metavar="N,N", help="Token ids instead.", show_default=False)]
ParseSpecial = Annotated[
    bool,
    typer.Option("--parse-special", help="Take control tokens that are written in what is said for what they are."),
]
ChatTemplatePath = Annotated[
    Path | None,
    typer.Option("--chat-template", metavar="FILE", help="A chat template in place of the model's own."),
]
ToolsPath = Annotated[
    Path | None, typer.Option("--tools", metavar="FILE", help="Tools for the chat template: a JSON list of objects.")
]
DocumentsPath = Annotated[
    Path | None, typer.Option("--documents", metavar="FILE", help="Documents for it: a JSON list of objects.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, show_default=False, help="Tokens of an answer at most, else 128 if they fit."),
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from this many; 0 is all.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Draw from those that have this share of the likeliest's probability.")
]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 tokens that were there before are less likely.")
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed draws the same text.")]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Tokens that the model is to hold: phi3's longrope differs by it."),
]
LockedPlan = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Run the plan of this lock file, or refuse.")
]


def asked_device(name: str | None, described: str | None) -> Device:
    """The device of a name on this machine, `cpu` unless told, or one that is described: to plan for, not to run on."""
    from kernelmux.contract.device import described_device, find_device

    if described is None:
        return find_device("cpu" if name is None else name)
    if name is not None:
        raise typer.BadParameter(f"it stands in place of --device {name}: ask for one", param_hint="--device-as")
    return described_device(described)


def open_asked(path: Path | None, random: str | None, device: str = "cpu", context: int | None = None) -> Model:
    """The model of a file, or a random one whose weights are drawn on the device when they are packed.

    It is to hold `context` tokens. On stderr a line where weights are held otherwise than they are stored.
    """
    from kernelmux.contract.device import find_device
    from kernelmux.run.model import load, load_random

    if path is not None and random is None:
        opened = load(path, context or 0)
        for told in opened.source.file.held:
            say(f"kernelmux: {told}", err=True)
        return opened
    if path is None and random is not None:
        return load_random(random, find_device(device).torch, context or 0)
    raise typer.BadParameter("name a model, or --random SHAPE:FORMAT, and not both", param_hint="MODEL")


def refuse_together(option: str, **others: object) -> None:
    """An error where others are asked for beside an option that has no use for them."""
    if option and (asked := [f"--{name}" for name, value in others.items() if value]):
        raise typer.BadParameter(f"{option} is without {' and '.join(asked)}: ask for one of them", param_hint=option)


def refuse_overwriting(option: str, written: Path | None, **others: Path | None) -> None:
    """An error where the file to write is one that the command reads or also writes, by whatever path or link.

    Also for `-`, which elsewhere is stdin or stdout, and where there is no folder for it: before the work, not after.
    """
    if written == Path("-"):
        raise typer.BadParameter("it is written to a file, not to stdout: name one", param_hint=f"{option} -")
    for what, path in others.items():
        if written is not None and path is not None and _same_file(written, path):
            raise typer.BadParameter(f"{written} is the {what} asked for: name another file", param_hint=option)
    if written is not None:
        refuse_model(written)
        if not written.absolute().parent.is_dir():
            raise KernelmuxError(f"there is no folder {written.parent} to write {written.name} to")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # One of them does not exist: lost to nobody, unless both are to be written.
        return one.resolve() == other.resolve()


def asked_policy(path: Path | None, exact: bool) -> Policy | Path | None:
    """What `--policy` or `--exact` asks for, which is a policy of its own."""
    from kernelmux.policy.policy import EXACT, shipped_policy

    if exact and path is not None:
        message = f'ask for it or for --policy {path}, or let the file say extends = "exact"'
        raise typer.BadParameter(message, param_hint="--exact")
    return shipped_policy(EXACT) if exact else path


def make_plan(
    model: Model,
    policy: Policy | Path | None,
    use: list[str] | None,
    device: str | Device,
    strict: bool = False,
    max_rows: int | None = None,
) -> Plan:
    """A plan as asked for; what must be told of it is said in red on stderr, and is the end where `strict`."""
    from kernelmux.plan.plan import MAX_ROWS

    return noted(model.plan(policy, use=use or (), device=device, max_rows=max_rows or MAX_ROWS), strict)


def noted(plan: Plan, strict: bool) -> Plan:
    """The plan, once its notes are said; where `strict` they are the end, and so is a kernel that raises in a walk."""
    for note in plan.notes:
        say(f"kernelmux: {note}", err=True, fg="red", bold=True)
    if not strict:
        return plan
    if plan.notes:
        say("kernelmux: PlanError: --strict takes no plan of which such things are to be said", err=True)
        raise typer.Exit(1)
    return replace(plan, strict=True)


def tell_cache(cache: PackedCache | None) -> None:
    """On stderr, once all is written: what is to be told of packed weights on disk. Ctrl-C ends the writing."""
    if cache is not None:
        try:
            with ProgressBar() as bar:
                bar.begin("keeping packed weights")
                cache.background.finish()
        finally:
            for note in cache.notes:
                say(f"kernelmux: {note}", err=True)


def asked_sampling(
    temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float, seed: int
) -> Sampling:
    """The settings, or an error where there are none such; on stderr a line where some have no effect."""
    from kernelmux.run.sampling import Sampling

    asked_for = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    unused = {"--top-p": top_p != 1, "--top-k": top_k, "--min-p": min_p}
    if not temperature and (asked := [option for option, given in unused.items() if given]):
        verb = "has" if len(asked) == 1 else "have"
        say(f"kernelmux: {' and '.join(asked)} {verb} no effect at temperature 0: give --temperature", err=True)
    return asked_for


def refuse_beside_plan(
    locked: Path | None, policy: Path | None, exact: bool, use: list[str] | None, max_rows: int | None
) -> None:
    """An error where a plan on file is asked for, and what it would be made by as well."""
    if locked is not None and (policy or exact or use or max_rows):
        raise typer.BadParameter(
            "a locked plan takes no --policy, no --exact and no --use, nor --max-rows", param_hint="--plan"
        )


def chosen_plan(
    model: Model,
    locked: Path | None,
    policy: Path | None,
    exact: bool,
    use: list[str] | None,
    device: str,
    strict: bool,
    max_rows: int | None,
) -> Plan:
    """The plan on file, or one that is made now."""
    if locked is not None:
        return noted(model.locked_plan(locked, device), strict)
    return make_plan(model, asked_policy(policy, exact), use, device, strict, max_rows)


def tell_replaced(session: Session) -> None:
    """In red on stderr, once an answer has ended: which kernels raised, and what ran instead."""
    from kernelmux.run.replaced import told

    for line in told(session.replaced):
        say(f"kernelmux: {line}", err=True, fg="red", bold=True)


def row_counts(text: str) -> list[int]:
    """`1,16,512` as numbers."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise KernelmuxError(f"--m {text}: row counts from 1, with commas between them, as 1,16,512")
    return [int(part) for part in parts]


P = ParamSpec("P")


def traced(command: Callable[P, None]) -> Callable[P, None]:
    """A command that with `--verbose` prints the traceback of an error to stderr, before `main` says it in one line."""

    @wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        try:
            command(*args, **options)
        except KernelmuxError as error:
            if options["verbose"]:
                from kernelmux.contract import registry

                broken = registry.current().backends.get(error.backend or "")
                typer.echo((broken and broken.trace) or "".join(traceback.format_exception(error)), err=True)
            raise

    return run
