"""The default's choice, and policies that were tuned, beside every backend alone: whole steps; writes a result.

    python tests/bench/compare_choices.py --device cuda --models llama-8b:Q4_K_M FILE.gguf --out h200-choice.json

A model is a GGUF file, or a shape with random weights. `--policy llama-8b:Q4_K_M=tuned.toml` is for that model,
`--policy tuned.toml` for all. What cannot be planned, packed or run is a row that says why. docs/performance.py makes
a table and a plot of such files.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from result import release

from kernelmux.contract import registry
from kernelmux.contract.device import Device, find_device, is_out_of_memory
from kernelmux.graph.formats import human_count
from kernelmux.measure.report import make_report, save_report
from kernelmux.measure.timing import Timing
from kernelmux.measure.works import Batch
from kernelmux.plan.budget import less_exact
from kernelmux.plan.plan import Plan
from kernelmux.plan.speed import Speeds
from kernelmux.run.bench import time_step
from kernelmux.run.model import Model, load, load_random
from kernelmux.run.session import Session

ROWS = (1, 2, 4, 8, 16, 32, 64, 512, 2048)
ROUNDS = 3
"""Times that every plan's step is timed, in turns; the least median counts."""
PATIENCE = 10.0
"""Seconds after which a plan has no further turn at a row count."""
LONGEST = 5.0
"""Seconds of a step, beyond which a plan is not asked for more rows."""
HELD = 0.6
"""Share of the free memory within which all plans' weights are held beside each other."""
OVER = "there was no time left"
METHOD = (
    "whole steps, plans in turn, the least of up to {rounds} medians: up to 127 rows decode a sequence each at "
    "{context} tokens, more are one prompt; a backend alone is `--use *=BACKEND`, what it lacks as by default"
)


@dataclass
class Way:
    """A way to run a model: how a user asks for it, its plan, and what it took."""

    label: str
    policy: Path | None = None
    use: tuple[str, ...] = ()
    plan: Plan | None = None
    fault: str = ""
    """Why it is not asked for more."""
    times: dict[int, list[Timing]] = field(default_factory=dict)
    holder: Session | None = None
    """Keeps the packed weights from one row count to the next."""

    def make_plan(self, model: Model, device: Device, max_rows: int, context: int) -> None:
        try:
            plan = model.plan(self.policy, use=self.use, device=device, max_rows=max_rows, context=context)
        except Exception as error:
            self.fault = told(error)
            return
        alone = [use.partition("=")[2] for use in self.use]
        if alone and not any(step.choice.backend in alone for step in plan.steps):
            self.fault = f"{alone[0]} has no kernel for this model here"
            return
        self.plan = plan

    def pack(self, model: Model) -> None:
        assert self.plan is not None
        try:
            self.holder = model.session(self.plan, 1)
            for _ in self.holder.prepare(()):
                pass
        except Exception as error:
            self.give_up(error)

    def time(self, model: Model, rows: int, context: int) -> None:
        """One turn."""
        assert self.plan is not None
        try:
            timing = time_step(model, self.plan, rows, context)
        except Exception as error:
            self.give_up(error)
        else:
            self.times.setdefault(rows, []).append(timing)
            if timing.median > LONGEST * 1e6:
                self.fault = f"a step of {human_count(rows, 'row')} took {timing.median / 1e6:.1f} s"

    def give_up(self, error: Exception) -> None:
        """Notes why, and lets go of the weights: the others may need the room."""
        self.fault = f"out of memory: {told(error)}" if is_out_of_memory(error) else told(error)
        self.holder = None

    def best(self, rows: int) -> Timing | None:
        return min(self.times.get(rows, []), key=lambda timing: timing.median, default=None)

    def row(self, rows: int) -> dict[str, Any]:
        """What the result says of it at a row count: times, or why there are none."""
        named = {"m": rows, "plan": self.label, "alone": bool(self.use)}
        if (found := self.best(rows)) is None or self.plan is None:
            return {**named, "fault": self.fault}
        speed = Speeds(self.plan).at(rows)
        return {
            **named,
            "us": round(found.median, 1),
            "p10 to p90": [round(found.p10, 1), round(found.p90, 1)],
            "tokens/s": round(rows / found.median * 1e6, 1),
            "captured": found.captured,
            "predicted us": round(speed.us, 1),
            "measured": round(max(1 - speed.unmeasured, 0.0), 3),
            "choice": choice(self.plan, rows),
            "less exact": less_exact(self.plan, rows, Batch.of(rows, 1).sequences),
            "weights GB": round(self.plan.packed_bytes / 1e9, 2),
        }


@dataclass
class Comparison:
    """All ways to run one model."""

    name: str
    model: Model
    device: Device
    rows: Sequence[int]
    context: int
    rounds: int
    ends: float
    """When no further plan begins, as `time.monotonic()` tells it."""

    def run(self, policies: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """A row of the result for each way and row count, as they are known."""
        ways = [*self._ways(policies)]
        for way in ways:
            way.make_plan(self.model, self.device, max(self.rows), self.context)
        able = [way for way in ways if way.plan is not None]
        for group in [[way for way in ways if way.plan is None], *self._groups(able)]:
            for way, rows in self._time(group):
                row = {"model": self.name, **way.row(rows)}
                print(*row.values(), sep=" | ", flush=True)
                yield row

    def _ways(self, policies: Sequence[Path]) -> Iterator[Way]:
        yield Way("auto")
        for path in policies:
            yield Way("tuned" if len(policies) == 1 else path.stem, path)
        for backend in registry.current().working:
            yield Way(backend, use=(f"*={backend}",))

    def _groups(self, ways: Sequence[Way]) -> list[Sequence[Way]]:
        """Those whose weights are held at once: all where there is room, else each by itself."""
        forms = {form: nbytes for way in ways if way.plan for form, nbytes in way.plan.packed_forms.items()}
        free = self.device.platform.free_bytes(self.device)
        return [ways] if free is None or sum(forms.values()) <= HELD * free else [[way] for way in ways]

    def _time(self, ways: Sequence[Way]) -> Iterator[tuple[Way, int]]:
        """Those that have been timed, or have given up, at a row count."""
        for way in ways:
            self._begin(way)
        for rows in self.rows:
            for way in ways:
                way.fault = self._hopeless(way, rows)
            spent = {way.label: 0.0 for way in ways}
            alike: dict[str, Way] = {}
            for way in ways:
                if way.plan is not None and not way.fault:
                    # Plans whose steps are the same at this count are timed once: what differed would be noise.
                    first = alike.setdefault(repr(way.plan.schedule(rows, Batch.of(rows, 1).sequences).identity), way)
                    way.times[rows] = first.times.setdefault(rows, [])
            for turn in range(self.rounds):
                for way in alike.values():
                    if not way.fault and spent[way.label] < PATIENCE and not (turn and self._is_over()):
                        spent[way.label] += self._turn(way, rows)
            yield from ((way, rows) for way in ways)
        for way in ways:
            way.holder = None
        release()

    def _turn(self, way: Way, rows: int) -> float:
        """Seconds that it took."""
        started = time.monotonic()
        way.time(self.model, rows, self.context)
        if way.holder is None:
            release()
        return time.monotonic() - started

    def _is_over(self) -> bool:
        return time.monotonic() > self.ends

    def _begin(self, way: Way) -> None:
        if way.plan is None:
            return
        if self._is_over():
            way.fault = OVER
            return
        started = time.monotonic()
        way.pack(self.model)
        print(f"{self.name} | {way.label} | {way.fault or f'packed in {time.monotonic() - started:.1f} s'}", flush=True)
        if way.holder is None:
            release()

    def _hopeless(self, way: Way, rows: int) -> str:
        """Why a step had better not be run: there is no time, or it is predicted to take too long."""
        if way.fault or way.plan is None:
            return way.fault
        if self._is_over():
            return OVER
        seconds = Speeds(way.plan).at(rows).us / 1e6
        step = f"a step of {human_count(rows, 'row')}"
        return f"{step} is predicted to take {seconds:.1f} s" if seconds > LONGEST else ""


def choice(plan: Plan, rows: int) -> str:
    """The kernels of the products, with how many of the model's each has: `cupy:dp4a 224, torch:bf16 1`."""
    counts: Counter[str] = Counter()
    for step in plan.schedule(rows, Batch.of(rows, 1).sequences).steps:
        parts = [plan.plain[name].op for name in plan.fused.get(step.node.name, ())] or [step.node.op]
        counts[step.choice.name] += parts.count("mul_mat")
    return ", ".join(f"{name} {count}" for name, count in counts.most_common() if count)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def open_model(name: str, device: Device) -> tuple[str, Model]:
    """A file by its stem, a shape with random weights by what it is called."""
    if name.endswith(".gguf"):
        return Path(name).stem, load(name)
    return name, load_random(name, device.torch)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL")
    parser.add_argument("--policy", action="append", default=[], metavar="[MODEL=]FILE")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--budget-seconds", type=float, default=3600.0, help="when no further plan begins")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="", help="where the tree is no checkout")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    device, ends = find_device(asked.device), time.monotonic() + asked.budget_seconds
    rows: list[dict[str, Any]] = []
    for name in asked.models:
        named = [each.rpartition("=") for each in asked.policy]
        policies = [Path(path) for of, _, path in named if of in ("", name)]
        try:
            label, model = open_model(name, device)
        except Exception as error:
            print(f"{name} | {told(error)}", flush=True)
            continue
        named = device.name if device.name != device.kind else device.device_class
        title = f"The choice beside every backend alone on {named}"
        method = METHOD.format(rounds=asked.rounds, context=asked.context)
        comparison = Comparison(label, model, device, sorted(asked.rows), asked.context, asked.rounds, ends)
        for row in comparison.run(policies):
            rows.append(row)
            # Whatever ends this, what was measured is kept.
            save_report(make_report(title, device, method, rows, commit=asked.commit), asked.out)
        del model, comparison
        release()
    print(f"{asked.out}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
