"""Runs the tests that need a GPU and writes what came of them: `make gpu-test`, or a share of it, `SHARD=1/2`.

Enters: which cases of the conformance suite (the smoke ones, or all, or one backend's, or random ones), which share of
them, whether compute-sanitizer looks on. Leaves: docs/results/CARD-gpu-test.json (CARD-BACKEND-test.json), a row each.
Processes side by side share the card, for a case keeps it busy for less time than Python takes to draw its numbers;
they take turns there, of some milliseconds each, unless a daemon of CUDA's MPS has them share it at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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


def main() -> int:
    """0 where nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every case of the conformance suite, not the smoke ones")
    parser.add_argument("--shard", default="1/1", metavar="K/N")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--commit", default="")
    parser.add_argument("--only", default="", metavar="BACKEND", help="its cases, to CARD-BACKEND-test.json")
    parser.add_argument("--sanitizer", choices=SANITIZERS, help="this one looks on, at the conformance suite alone")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="so many random cases of each op instead")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first process's random cases; each has the next one"
    )
    parser.add_argument("--seconds", type=float, help="after which no more random cases begin")
    asked = parser.parse_args()
    if asked.fuzz:
        rows = [_fuzz(asked.fuzz, asked.seed, asked.processes, asked.only, asked.seconds)]
        _write(asked.out, rows, asked.commit, asked.only)
        return int(any(row["failed"] for row in rows))
    index, count = map(int, asked.shard.split("/"))
    # A shard is the same cases whatever the number of processes.
    shares = [f"{index + count * i}/{count * asked.processes}" for i in range(asked.processes)]
    marks = "gpu" if asked.all else "gpu and smoke"
    words = ["-k", f"Test{asked.only.capitalize()}"] if asked.only else []
    conformance = [["-m", marks, *words, str(HERE / "test_conformance.py"), "--shard", share] for share in shares]
    name = f"{asked.sanitizer or 'conformance'}, {'all' if asked.all else 'smoke'} cases"
    rows = [_run(f"{name} {asked.shard}" if count > 1 else name, conformance, asked.sanitizer)]
    if index == count and not asked.sanitizer:
        # Alone on the card: they look at its memory.
        suite_itself = ROOT / "tests" / "core" / "conformance" / "test_wrong_backends.py"
        others = ["-m", "gpu", str(HERE), str(suite_itself), "--ignore", str(HERE / "test_conformance.py")]
        rows.append(_run("capture, SmolLM2, memory", [others]))
    _write(asked.out, rows, asked.commit, asked.only)
    return int(any(row["failed"] for row in rows))


def _run(part: str, commands: Sequence[Sequence[str]], sanitizer: str | None = None) -> dict[str, object]:
    """A row with the counts of several runs of pytest side by side; what they print on failure is passed on."""
    started = time.perf_counter()
    prefix = ("compute-sanitizer", "--tool", sanitizer, "--error-exitcode", "9") if sanitizer else ()
    counts = dict.fromkeys(("passed", "skipped", "failed"), 0)
    # Each process would start as many threads as the machine has cores.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if len(commands) > 1 else {})
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for index, arguments in enumerate(commands):
            report = Path(folder) / f"{index}.xml"
            command = [*prefix, sys.executable, "-m", "pytest", "-q", "--no-header", f"--junit-xml={report}"]
            process = subprocess.Popen(
                [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
            )
            running.append((process, report))
        for process, report in running:
            printed, _ = process.communicate()
            # 1: tests failed, and the report names them. 5: no test of that share is left.
            ended = process.returncode in (0, 1, 5) and report.exists()
            if not ended or (sanitizer and SANITIZERS[sanitizer] not in printed):
                print(printed[-6000:])
                counts["failed"] += 1
                continue
            suite = ElementTree.parse(report).getroot()[0]
            found = suite.attrib
            failed = int(found["failures"]) + int(found["errors"])
            counts["skipped"] += int(found["skipped"])
            counts["failed"] += failed
            counts["passed"] += int(found["tests"]) - failed - int(found["skipped"])
            for test in suite.iter("testcase"):
                for failure in (*test.findall("failure"), *test.findall("error")):
                    print(test.get("name"), (failure.text or failure.get("message") or "")[-600:], sep="\n")
    row = {"part": part, **counts, "seconds": round(time.perf_counter() - started)}
    print(row, flush=True)
    return row


def _fuzz(count: int, seed: int, processes: int, backend: str, seconds: float | None) -> dict[str, object]:
    """A row with the counts of random cases, so many of each op spread over processes; what fails is passed on."""
    started = time.perf_counter()
    share = -(-count // processes)
    with tempfile.TemporaryDirectory() as folder:
        running = [_random_cases(Path(folder, f"{at}"), share, seed + at, backend) for at in range(processes)]
        ends = [_ended(process, started + seconds if seconds else None) for process in running]
        reports = [Path(folder, f"{at}", "report.json") for at in range(processes)]
        found = [json.loads(path.read_text("utf-8")) for path in reports if path.exists()]
    for outcome in (each for report in found for each in report["outcomes"] if each["status"] == "fail"):
        print(outcome["kernel"], outcome["case"], *outcome["failures"], sep="\n  ", flush=True)
    cut = "" if all(ends) else ", cut short"
    row: dict[str, object] = {
        "part": f"random cases (check --fuzz {share}, seeds {seed} to {seed + processes - 1}){cut}",
        "passed": sum(report["totals"]["pass"] for report in found),
        "skipped": 0,
        "failed": sum(report["totals"]["fail"] for report in found) + processes - len(found),
        "seconds": round(time.perf_counter() - started),
    }
    print(row, flush=True)
    return row


def _random_cases(folder: Path, count: int, seed: int, backend: str) -> subprocess.Popen[bytes]:
    """`check --fuzz`, started in a folder of its own, to which its report goes."""
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "kernelmux",
        "check",
        "--device",
        "cuda",
        "--fuzz",
        f"{count}",
        "--seed",
        f"{seed}",
    ]
    command += ["--save", "report.json", *(["--backend", backend] if backend else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def _ended(process: subprocess.Popen[bytes], deadline: float | None) -> bool:
    """Whether a process got to its end before the deadline; else it is interrupted, and reports what it found."""
    try:
        process.wait(None if deadline is None else max(0.0, deadline - time.perf_counter()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    return True


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
