"""What all commands have in common beyond their options: each option counts once, and stdout is the command's own."""

from __future__ import annotations

from collections import Counter
from typing import Any

from typer.core import TyperCommand

from kernelmux.cli.output import own_stdout


class Command(TyperCommand):
    """A command of which no option that takes one value is given twice: the first would be lost and nobody told."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Usage error for an option given twice that is neither a switch nor one that may be repeated."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param, times in Counter(order).items():
            single = not (param.multiple or getattr(param, "is_flag", False) or param.param_type_name == "argument")
            if times > 1 and single and not ctx.resilient_parsing:
                ctx.fail(f"{max(param.opts, key=len)} is given {times} times, and takes one value: give it once")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; what backends and libraries print meanwhile goes to stderr."""
        with own_stdout():
            return super().invoke(ctx)
