"""What all commands have in common: each option counts once, stdout is the command's own, usage errors are one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from kernelmux.cli.output import own_stdout, say
from kernelmux.errors import printable

UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""What is raised where a command is not called as it can be: click's, or that of the copy which newer typers bring."""


class Command(TyperCommand):
    """A command of which no option is given for nothing: what would be lost, and nobody told, is a usage error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Usage error for an option given twice that is neither a switch nor one that may be repeated, or given empty.

        Empty is as if it were not given where that is the default: `--backend "$NAME"` would mean all of them.
        """
        with _raised_of(ctx):
            given, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for param, times in Counter(order).items():
                if param.param_type_name == "argument" or ctx.resilient_parsing:
                    continue
                option = max(param.opts, key=len)
                if times > 1 and not (param.multiple or getattr(param, "is_flag", False)):
                    ctx.fail(f"{option} is given {times} times, and takes one value: give it once")
                value = given[param.name]
                if (param.multiple and "" in value) or (value == "" and param.default == ""):
                    ctx.fail(f"{option} is empty: give it a value, or leave it out")
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; what backends and libraries print meanwhile goes to stderr."""
        with own_stdout(), _raised_of(ctx):
            return super().invoke(ctx)


@contextmanager
def _raised_of(ctx: Any) -> Iterator[None]:
    """A usage error that is raised in the block is of this command, unless it says of which."""
    try:
        yield
    except UsageError as error:
        error.ctx = error.ctx or ctx
        raise


def say_usage(error: Any) -> None:
    """A usage error in one line on stderr: what is wrong, what would work, and which help tells more.

    Of a group that is called without a command it is the group's help.
    """
    said, ctx = error.format_message(), error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        # With rich it is printed where the error is made, and here it is empty.
        if said:
            typer.echo(said, err=True)
        return
    parts = [said.rstrip(".")]
    if commands := getattr(ctx and ctx.command, "commands", None):
        parts.append(f"commands: {', '.join(commands)}")
    parts.append(f"{ctx.command_path if ctx else 'kernelmux'} --help tells what there is")
    say(f"kernelmux: UsageError: {printable(' '.join('; '.join(parts).split()))}", err=True)
