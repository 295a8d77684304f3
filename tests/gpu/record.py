"""Runs the tests that need a GPU and writes what came of them: `make gpu-test`, or a share of it, `SHARD=1/2`.

Enters: which cases of the conformance suite (the smoke ones, or all, or the huge ones, one backend's, or random ones),
which share of them, whether compute-sanitizer looks on. Leaves: docs/results/CARD-gpu-test.json, or
CARD-BACKEND-test.json, with a row each.
Processes side by side share the card, for a case keeps it busy for less time than Python takes to draw its numbers;
they take turns there, of some milliseconds each, unless a daemon of CUDA's MPS has them share it at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from kernelmux.contract.device import find_device
from kernelmux.measure.report import card, make_report, save_report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZERS = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards displayed"}
"""What a tool of compute-sanitizer prints where it found nothing; else what it found is printed."""
WATCHING = ("--target-processes", "all", "--error-exitcode", "9")
"""`timeout` begins the process that is looked at."""
TORCHS = ("at6native", "cutlass", "xmma", "cublas", "gemv2")
"""Parts of the names of torch's own kernels, and of those of the libraries that it calls."""
LAST = 6000
"""Characters of what a process printed that are passed on where it did not end well."""
DIE = 20
"""Seconds that an interrupted process has to say what it found."""


def main() -> int:
    """0 where nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every case of the conformance suite, not the smoke ones")
    parser.add_argument("--huge", action="store_true", help="its cases of more than 2^31 elements instead")
    parser.add_argument("--shard", default="1/1", metavar="K/N")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--commit", default="")
    parser.add_argument("--only", default="", metavar="BACKEND", help="its cases, to CARD-BACKEND-test.json")
    parser.add_argument("--sanitizer", choices=SANITIZERS, help="this one looks on, at the conformance suite alone")
    parser.add_argument("--own", action="store_true", help="it looks at the backends' own kernels, not at torch's")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="so many random cases of each op instead")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first process's random cases; each has the next one"
    )
    parser.add_argument("--seconds", type=float, help="after which no more cases begin")
    asked = parser.parse_args()
    if asked.own and not asked.sanitizer:
        parser.error("--own is said to a sanitizer: name it by --sanitizer")
    index, count = map(int, asked.shard.split("/"))
    if asked.fuzz:
        share, last = -(-asked.fuzz // asked.processes), asked.seed + asked.processes - 1
        part = f"random cases (check --fuzz {share}, seeds {asked.seed} to {last})"
        each = [["--fuzz", f"{share}", "--seed", f"{asked.seed + at}"] for at in range(asked.processes)]
    else:
        kind = "huge" if asked.huge else "all" if asked.all else "smoke"
        part = f"{asked.sanitizer or 'conformance'}, {kind} cases" + (f" {asked.shard}" if count > 1 else "")
        part += ", torch's kernels left out" if asked.own else ""
        cases = {"huge": ["--large", "--case", "*-huge-*"], "all": [], "smoke": ["--smoke"]}[kind]
        # A shard is the same cases whatever the number of processes.
        shares = [f"{index + count * i}/{count * asked.processes}" for i in range(asked.processes)]
        each = [[*cases, "--shard", share] for share in shares]
    looks_on = ["compute-sanitizer", "--tool", asked.sanitizer, *WATCHING] if asked.sanitizer else []
    for name in TORCHS if asked.own else ():
        looks_on += ["--kernel-name-exclude", f"kernel_substring={name}"]
    rows = [_check(part, each, asked.only, asked.seconds, looks_on, SANITIZERS.get(asked.sanitizer, ""))]
    if index == count and not (asked.sanitizer or asked.fuzz or asked.huge or asked.only):
        rows.append(_test("capture, SmolLM2, memory"))
    _write(asked.out, rows, asked.commit, asked.only)
    return int(any(row["failed"] for row in rows))


def _check(
    part: str, each: Sequence[Sequence[str]], backend: str, seconds: float | None, looks_on: Sequence[str], clean: str
) -> dict[str, object]:
    """A row with the counts of `kernelmux check` in several processes; what fails is passed on.

    Where they are interrupted after so many seconds, they count what they got to. `looks_on` begins the command of a
    tool that prints `clean` where it found nothing.
    """
    started = time.perf_counter()
    limit = ["timeout", "--signal=INT", f"--kill-after={DIE}", f"{seconds}"] if seconds else []
    words = [*looks_on, *limit, sys.executable, "-m", "kernelmux", "check", "--device", "cuda", "--save", "report.json"]
    words += ["--backend", backend] if backend else []
    counts, cut = dict.fromkeys(("pass", "refused", "fail"), 0), ""
    with tempfile.TemporaryDirectory() as top:
        folders = [Path(top, f"{at}") for at in range(len(each))]
        running = [_begun([*words, *own], folder) for own, folder in zip(each, folders, strict=True)]
        for process, folder in zip(running, folders, strict=True):
            code = process.wait()
            printed = (folder / "printed").read_text("utf-8", "replace")
            report = folder / "report.json"
            if not report.exists() or clean not in printed:
                print(printed[-LAST:], f"{' '.join(process.args)} ended with {code}", flush=True)
                counts["fail"] += 1
            if report.exists():
                found = json.loads(report.read_text("utf-8"))
                cut = ", cut short" if any(note.startswith("interrupted") for note in found["notes"]) else cut
                for status in counts:
                    counts[status] += found["totals"][status]
                for outcome in (one for one in found["outcomes"] if one["status"] == "fail"):
                    print(outcome["kernel"], outcome["case"], *outcome["failures"], sep="\n  ", flush=True)
    return _told(part + cut, *counts.values(), started)


def _begun(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """A process in a folder of its own, to whose file `printed` it prints."""
    folder.mkdir()
    # Each process would start as many threads as the machine has cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "printed").open("wb") as printed:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT)


def _test(part: str) -> dict[str, object]:
    """A row with the counts of pytest on all other tests that need a card; alone there: they look at its memory."""
    started = time.perf_counter()
    suite_itself = ROOT / "tests" / "core" / "conformance" / "test_wrong_backends.py"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junit-xml={report}", "-m", "gpu", str(HERE)]
        command += [str(suite_itself), "--ignore", str(HERE / "test_conformance.py")]
        ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if ran.returncode:
            print(ran.stdout[-LAST:])
        found = ElementTree.parse(report).getroot()[0].attrib if report.exists() else {"errors": "1"}
    tests, skipped, *bad = (int(found.get(key, 0)) for key in ("tests", "skipped", "failures", "errors"))
    return _told(part, tests - skipped - sum(bad), skipped, sum(bad), started)


def _told(part: str, passed: int, skipped: int, failed: int, started: float) -> dict[str, object]:
    took = round(time.perf_counter() - started)
    row: dict[str, object] = {"part": part, "passed": passed, "skipped": skipped, "failed": failed, "seconds": took}
    print(row, flush=True)
    return row


def _write(folder: Path, rows: Sequence[dict[str, object]], commit: str, backend: str) -> None:
    """Adds rows to the card's file, or a backend's own; a part that was run before is replaced."""
    device = find_device("cuda" if torch.cuda.is_available() else "cpu")
    path = folder / f"{card(device)}-{backend or 'gpu'}-test.json"
    known = {row["part"]: row for row in json.loads(path.read_text("utf-8"))["rows"]} if path.exists() else {}
    known |= {row["part"]: row for row in rows}
    how = f"`tests/gpu/record.py --only {backend}`, with `--all` or `--sanitizer`" if backend else "`make gpu-test`"
    method = f"{how}; a case that every kernel refuses is skipped with the reason"
    ordered = [known[part] for part in sorted(known)]
    of = f" of {backend}" if backend else ""
    document = make_report(f"GPU tests{of} on {device.name}", device, method, ordered, commit=commit)
    document["versions"]["cuda"] = str(torch.version.cuda)
    folder.mkdir(parents=True, exist_ok=True)
    save_report(document, path)


if __name__ == "__main__":
    sys.exit(main())
