"""The command line: one file a command. Errors are one line on stderr and exit code 2; Ctrl-C is 130, SIGTERM 143."""

from __future__ import annotations

import faulthandler
import sys
from contextlib import suppress

import typer

from kernelmux import __version__
from kernelmux.cli.backends import backends
from kernelmux.cli.bench import bench
from kernelmux.cli.bisect import bisect
from kernelmux.cli.chat import chat
from kernelmux.cli.check import check
from kernelmux.cli.command import Command, UsageError, say_usage
from kernelmux.cli.compare import compare
from kernelmux.cli.ending import interrupted_once, removing_parts
from kernelmux.cli.graph import graph
from kernelmux.cli.info import info
from kernelmux.cli.output import open_streams, say, tell
from kernelmux.cli.plan import plan
from kernelmux.cli.policy import policy
from kernelmux.cli.quantize import quantize
from kernelmux.cli.report import report
from kernelmux.cli.run import run
from kernelmux.cli.trace import trace
from kernelmux.cli.tune import tune
from kernelmux.cli.waiting import wait_by_load
from kernelmux.contract.device import is_out_of_memory, out_of_memory
from kernelmux.errors import KernelmuxError

app = typer.Typer(
    name="kernelmux",
    help="Run one LLM compute graph on many kernel libraries; a policy file chooses the kernel of every op.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (run, chat, info, quantize, plan, tune, graph, backends, check, compare, bisect, trace, report):
    app.command(cls=Command)(command)
app.add_typer(bench, name="bench")
app.add_typer(policy, name="policy")


def _version(asked: bool) -> None:
    if asked:
        tell(f"kernelmux {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Run one LLM compute graph on many kernel libraries; a policy file chooses the kernel of every op."""


def main() -> None:
    """The `kernelmux` command."""
    open_streams()
    # A kernel may take the process down: then its line is told. Where stderr is no file there is nowhere to tell it.
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, RuntimeError, AttributeError):
            faulthandler.enable()
    wait_by_load()
    try:
        with removing_parts(), interrupted_once():
            code = app(standalone_mode=False)
        sys.exit(code)
    except UsageError as error:
        say_usage(error)
        sys.exit(error.exit_code)
    except KernelmuxError as error:
        said = " ".join(part.strip() for part in str(error).splitlines())
        say(f"kernelmux: {type(error).__name__}: {said}", err=True)
        sys.exit(2)
    except OSError as error:  # A file that cannot be written to its end, or stdout.
        where = f"{error.filename}: " if error.filename else ""
        say(f"kernelmux: {where}{error.strerror or error}", err=True)
        sys.exit(2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        say(f"kernelmux: {out_of_memory('the device', error)}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
