"""`kernelmux bisect`: the nodes, kernels and row counts to blame for wrong results, and a policy that works around."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.common import (
    Context,
    DeviceName,
    Exact,
    Json,
    ModelPath,
    PolicyPath,
    SaveJson,
    TokenIds,
    Use,
    asked_policy,
    make_plan,
    open_asked,
    refuse_overwriting,
)
from kernelmux.cli.output import print_json, say
from kernelmux.cli.progress import ProgressBar
from kernelmux.cli.prompt import asked_ids, asked_prompt

if TYPE_CHECKING:
    from kernelmux.debug.bisect import Verdict
    from kernelmux.debug.suspects import Suspect
    from kernelmux.graph.graph import TensorNode
    from kernelmux.plan.plan import Plan
    from kernelmux.run.model import Model
    from kernelmux.run.session import Session

PROMPT_TOKENS = 64
"""Of the text of this package, where nobody names another."""
DECODED = 8
"""Tokens that are fed one by one, unless told."""


def bisect(
    model: ModelPath,
    policy: PolicyPath = None,
    exact: Exact = False,
    use: Use = None,
    against: Annotated[
        str, typer.Option("--against", metavar="KERNELS", help="Who runs instead of those to blame, in the policy.")
    ] = "reference",
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="What is run; - reads stdin.", show_default=False),
    ] = None,
    ids: TokenIds = None,
    decode: Annotated[
        int | None,
        typer.Option(
            "--decode", min=0, metavar="N", help="So many of the tokens are fed one by one, at the end, else 8."
        ),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option("--bound", min=0.0, help="NMSE of a row of logits, else ten times what all kernels state."),
    ] = None,
    write_policy: Annotated[
        Path | None, typer.Option("--write-policy", metavar="FILE", help="Write a policy without those to blame.")
    ] = None,
    write_cases: Annotated[
        Path | None,
        typer.Option("--write-cases", metavar="FILE", help="Write the shapes of those to blame, for check --cases."),
    ] = None,
    context: Context = None,
    device: DeviceName = "cpu",
    json: Json = False,
    save: SaveJson = None,
) -> None:
    """Find the smallest set of nodes, kernels and row counts without which the results are right.

    Results are those of the tokens' logits; right is what the reference makes of them. Exit code 0: all is right; 1:
    somebody is to blame, or nobody can be found.
    """
    from kernelmux.contract.device import start_device
    from kernelmux.debug.bisect import bisect as bisect_plan
    from kernelmux.debug.bisect import stated_error
    from kernelmux.measure.report import save_report
    from kernelmux.run.replaced import told

    start_device(device)
    refuse_overwriting("--save", save, model=model, policy=policy)
    refuse_overwriting("--write-policy", write_policy, model=model, policy=policy)
    refuse_overwriting("--write-cases", write_cases, model=model, policy=policy, **{"policy to write": write_policy})
    with ProgressBar() as bar:
        bar.begin("opening the model")
        opened = open_asked(model, None, device, context)
        bar.begin("planning")
        plan = make_plan(opened, asked_policy(policy, exact), use, device)
        tokens = _tokens(opened, prompt, ids)
        bar.begin("running the reference")
        decoded = min(DECODED, len(tokens) - 1) if decode is None else decode
        if bound is not None and bound < (stated := stated_error(plan)):
            say(f"kernelmux: --bound {bound:g} is below {stated:.2g}, which the kernels state together", err=True)
        made = 0

        def show(runs: int, error: float) -> None:
            nonlocal made
            made = runs
            bar.begin(f"run {runs + 1}, after an error of {error:.2g}")

        try:
            found = bisect_plan(
                opened,
                plan,
                tokens,
                decoded,
                instead=against.split(","),
                limit=bound,
                show=show,
            )
        except KeyboardInterrupt:
            say(f"interrupted after {made} runs: who is to blame is not known yet", err=True)
            raise
        written = _write(opened, plan, found, tokens, decoded, policy, write_policy, write_cases)
    if save is not None:
        save_report(_document(found), save)
    if json:
        print_json(_document(found))
    else:
        for line in (*told(found.replaced), *_lines(found), *written):
            say(line)
    raise typer.Exit(int(found.error > found.bound))


def _tokens(model: Model, prompt: str | None, ids: str | None) -> list[int]:
    from kernelmux.run.divergence import prose

    if prompt is not None and ids is not None:
        raise typer.BadParameter("they stand in place of --prompt: ask for one", param_hint="--ids")
    if ids is None:
        return model.encode(asked_prompt(prompt)) if prompt is not None else model.encode(prose())[:PROMPT_TOKENS]
    return model.encode(asked_ids(ids))


def _write(
    model: Model,
    plan: Plan,
    found: Verdict,
    tokens: Sequence[int],
    decoded: int,
    asked: Path | None,
    policy: Path | None,
    cases: Path | None,
) -> list[str]:
    """Writes what is asked for of those to blame; what to say of it."""
    from kernelmux.files import write_whole
    from kernelmux.policy.policy import DEFAULT, policy_text
    from kernelmux.policy.text import with_rules

    if found.policy is None:
        return [f"{path}: not written, for nobody is to blame" for path in (policy, cases) if path is not None]
    lines = []
    if policy is not None:
        before = f'extends = "{DEFAULT}"\n' if asked is None else policy_text(asked)
        rules = found.policy.document.rule[: len(found.policy.options)]
        write_whole(policy, with_rules(rules, before))
        lines.append(f"{policy}: a policy that works around it")
    if cases is not None:
        _write_cases(cases, model.session(plan, len(tokens)), found.blamed, tokens, decoded)
        check = f"kernelmux check --kernel {found.blamed[0].kernel} --cases {cases}"
        lines.append(f"{cases}: {check} shows whether it is wrong alone")
    return lines


def _write_cases(path: Path, session: Session, blamed: Sequence[Suspect], tokens: Sequence[int], decoded: int) -> None:
    """The launches to blame, at the row counts that are."""
    from kernelmux.conformance.case_file import capture_cases
    from kernelmux.debug.bisect import fed
    from kernelmux.graph.domain import Range

    def blames(rows: int, node: TensorNode) -> bool:
        return any(node.name == suspect.node and rows in Range(*suspect.rows) for suspect in blamed)

    with capture_cases(session, path, blames):
        for _ in fed(session, tokens, decoded):
            pass


def _lines(found: Verdict) -> list[str]:
    from kernelmux.debug.suspects import in_words

    said = f"error {found.error:.3g} after token {found.position + 1}"
    said = f"{found.raised}; {said}" if found.raised else said
    if found.error <= found.bound:
        return [f"nothing is wrong: {said}, within {found.bound:.2g}"]
    if not found.blamed:
        return [f"{said}, over {found.bound:.2g}, and no kernel is to blame: it is there without any of them"]
    where = ", where launches are captured or chained, and not one by one" if found.replayed else ""
    lines = [f"{said}, over {found.bound:.2g}{where}; without these it is {found.healed:.2g}:"]
    lines += [f"  {line}" for line in in_words(found.blamed)]
    if found.accomplices:
        lines += ["and only beside:", *(f"  {line}" for line in in_words(found.accomplices))]
    return [*lines, f"{found.runs} runs of the tokens, {found.proved_after} of them until it was proved"]


def _document(found: Verdict) -> dict[str, Any]:
    from dataclasses import asdict

    def told(suspects: Sequence[Suspect]) -> list[dict[str, Any]]:
        return [{"node": s.node, "op": s.op, "kernel": s.kernel, "rows": list(s.rows)} for s in suspects]

    return {
        "error": found.error,
        "position": found.position,
        "bound": found.bound,
        "blamed": told(found.blamed),
        "accomplices": told(found.accomplices),
        "healed": found.healed,
        "replayed": found.replayed,
        "runs": found.runs,
        "proved_after": found.proved_after,
        "raised": found.raised,
        "replaced": [asdict(each) for each in found.replaced],
    }
