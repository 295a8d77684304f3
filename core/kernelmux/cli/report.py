"""`kernelmux report`: one page of all that commands have saved in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelmux.cli.common import refuse_overwriting
from kernelmux.cli.output import say


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="With the JSON that commands save.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page, else report.html in the folder.")
    ] = None,
) -> None:
    """Make a page of what check, plan, compare, bisect, bench and trace have saved: to read, to attach, to keep."""
    from kernelmux.debug.page import documents, report_page
    from kernelmux.files import write_whole

    path = output or folder / "report.html"
    refuse_overwriting("--output", path, **{each.name: each for each in documents(folder)})
    write_whole(path, report_page(folder))
    say(f"{path}: written")
