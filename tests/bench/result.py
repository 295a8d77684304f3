"""What a measuring script finds: rows of a table, notes beside them, and a file of docs/results."""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernelmux.contract import Device, Kernel
from kernelmux.measure.ceilings import Ceilings
from kernelmux.measure.report import card, make_report, save_report

REPLAYED = "CUDA graphs replayed, operands rotated past the L2 cache; medians of 40 replays a launch"
"""How launches are timed."""


@dataclass
class Result:
    """Rows and notes of one part, and what was measured of the machine in the same run.

    `part` names its file, CARD-PART.json.
    """

    part: str
    title: str
    device: Device
    ceilings: Ceilings
    method: str = REPLAYED
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tried(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; None where it raises, and then a note."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.notes.append(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return None

    def attempt(self, what: str, measure: Callable[[], Any]) -> Any:
        """The same of a measurement: how long it took is printed, its memory given back."""
        started = time.perf_counter()
        found = self.tried(what, measure)
        print(f"[{self.part}] {what}: {time.perf_counter() - started:.1f} s", flush=True)
        release()
        return found

    def add(self, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """One row more, printed too; a failure is a note."""
        if (row := self.attempt(what, measure)) is not None:
            self.rows.append(row)
            print(*row.values(), sep=" | ", flush=True)

    def write(self, folder: Path, commit: str) -> None:
        """The file, unless nothing was measured."""
        if not self.rows:
            print(f"[{self.part}] nothing was measured:", *self.notes, sep="\n", flush=True)
            return
        gemm = ", ".join(f"{format} {rate / 1e12:.0f} TFLOP/s" for format, rate in self.ceilings.gemm.items())
        copy, read = self.ceilings.copy / 1e12, self.ceilings.read / 1e12
        said = f"In the same run: copy {copy:.2f} TB/s, read {read:.2f} TB/s, 8192^3 GEMM {gemm}."
        notes = [said, *dict.fromkeys(self.notes)]
        folder.mkdir(parents=True, exist_ok=True)
        report = make_report(self.title, self.device, self.method, self.rows, notes, commit)
        save_report(report, folder / f"{card(self.device)}-{self.part}.json")
        print(f"[{self.part}] {len(self.rows)} rows", *notes, sep="\n", flush=True)


def kernel_for(device: Device, made: type[Kernel], variant: Any = None) -> Any:
    """A kernel of a class as it is offered on a device, with a variant, or none: it takes its first then."""
    kernel = made()
    kernel.device, kernel.variant = device, variant
    return kernel


def release() -> None:
    """Gives memory back that nothing holds any more."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser of what every script takes: where results go, and the commit they are of."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--commit", default="", help="where the tree is no checkout")
    return parser
