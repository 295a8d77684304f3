"""Times kernelmux beside llama.cpp on one model file, in turns, and writes docs/results/NAME.json.

    python tests/bench/compare_llama_cpp.py MODEL --llama-python PATH --name cpu-smollm2

Each engine runs in a process of its own (their OpenMP pools must not meet), A B A B; medians are kept. A run reads a
prompt of 128 tokens five times and decodes 64 tokens after it, or after `--context` tokens more. `--llama-python` is an
interpreter that has llama-cpp-python, or llama-cpp-py-sync. `--use` and `--policy` are as in `kernelmux run`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT_TOKENS, DECODED, REPEATS = 128, 64, 5
VERSION = """
import importlib.metadata as m
for name in ("llama-cpp-python", "llama-cpp-py-sync"):
    try:
        print(name, m.version(name))
        break
    except m.PackageNotFoundError:
        pass
"""
IDS = [i * 37 % 40_000 + 100 for i in range(PROMPT_TOKENS)]


def time_kernelmux(asked: argparse.Namespace) -> dict[str, float]:
    import torch

    import kernelmux
    from kernelmux.run.session import Feed

    torch.set_num_threads(asked.threads)
    model = kernelmux.load(asked.model)
    session = model.session(model.plan(asked.policy, use=asked.use), PROMPT_TOKENS + asked.context + DECODED)
    list(session.prepare())
    prompts, decodes = [], []
    for _ in range(REPEATS):
        sequence = session.open()
        started = time.perf_counter()
        session.feed(sequence, IDS)
        prompts.append(time.perf_counter() - started)
        if asked.context:
            session.feed(sequence, _more(asked.context))
        started = time.perf_counter()
        for i in range(DECODED):
            session.step([Feed(sequence, [500 + i])]).argmax()
        decodes.append(time.perf_counter() - started)
        session.close(sequence)
    return _rates(prompts, decodes)


def time_llama_cpp(asked: argparse.Namespace) -> dict[str, float]:
    start, evaluate = _llama_cpp(asked.model, asked.threads, 512 + asked.context)
    prompts, decodes = [], []
    for _ in range(REPEATS):
        start()
        started = time.perf_counter()
        evaluate(IDS)
        prompts.append(time.perf_counter() - started)
        if asked.context:
            evaluate(_more(asked.context))
        started = time.perf_counter()
        for i in range(DECODED):
            evaluate([500 + i])
        decodes.append(time.perf_counter() - started)
    return _rates(prompts, decodes)


def _llama_cpp(path: str, threads: int, context: int) -> tuple[Callable[[], object], Callable[[list[int]], object]]:
    """What begins anew, and what evaluates tokens after those before: of whichever binding there is."""
    try:
        from llama_cpp import Llama
    except ImportError:
        from llama_cpp_py_sync import Llama as Other

        other = Other(path, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        past = [0]

        def start() -> None:
            other._clear_context_state()
            past[0] = 0

        def evaluate(ids: list[int]) -> None:
            for at in range(0, len(ids), 512):
                past[0] = other._eval_tokens(ids[at : at + 512], past[0])

        return start, evaluate
    model = Llama(path, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    return model.reset, model.eval


def _more(count: int) -> list[int]:
    return [i * 41 % 40_000 + 100 for i in range(count)]


def _rates(prompts: list[float], decodes: list[float]) -> dict[str, float]:
    # The first prompt also warms up; the median leaves it out.
    return {"prompt": PROMPT_TOKENS / statistics.median(prompts), "decode": DECODED / statistics.median(decodes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--name", default="cpu-smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=0, help="tokens between the prompt and those decoded")
    parser.add_argument("--policy")
    parser.add_argument("--use", action="append", default=[])
    parser.add_argument("--note", action="append", default=[], help="a line to keep with the result")
    parser.add_argument("--only", choices=("kernelmux", "llama.cpp"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        timed = time_kernelmux if asked.only == "kernelmux" else time_llama_cpp
        print(json.dumps(timed(asked)))
        return
    runs: dict[str, list[dict[str, float]]] = {"kernelmux": [], "llama.cpp": []}
    for _ in range(asked.rounds):
        for engine, python in (("kernelmux", sys.executable), ("llama.cpp", asked.llama_python)):
            command = [python, __file__, *sys.argv[1:], "--only", engine]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[engine].append(json.loads(output.splitlines()[-1]))
            print(engine, runs[engine][-1], flush=True)
    result = Path(__file__).parents[2] / "docs" / "results" / f"{asked.name}.json"
    result.write_text(json.dumps(_report(asked, runs), indent=1) + "\n")


def _report(asked: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    # llama.cpp's interpreter has no kernelmux.
    from kernelmux.contract.device import Device
    from kernelmux.measure.report import make_report, processor

    llama, version = subprocess.run(
        [asked.llama_python, "-c", VERSION], check=True, capture_output=True, text=True
    ).stdout.split()
    rows = []
    for phase in ("prompt", "decode"):
        rates = {engine: [run[phase] for run in of_engine] for engine, of_engine in runs.items()}
        ratios = [ours / theirs for ours, theirs in zip(rates["kernelmux"], rates["llama.cpp"], strict=True)]
        rows.append(
            {
                "work": f"prompt of {PROMPT_TOKENS} tokens"
                if phase == "prompt"
                else f"decode, {DECODED} tokens" + (f" after {asked.context} more" if asked.context else ""),
                "unit": "tokens/s",
                **{engine: round(statistics.median(of_engine), 1) for engine, of_engine in rates.items()},
                "ratio": round(statistics.median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            }
        )
    policy = " ".join([asked.policy or "default policy", *asked.use])
    method = f"{policy}; medians of {asked.rounds} processes each, in turns; ratio run by run"
    report = make_report(f"{Path(asked.model).name}, beside llama.cpp", Device("cpu"), method, rows, asked.note)
    report["machine"] = f"{processor()}, {asked.threads} threads"
    report["versions"][llama] = version
    return report


if __name__ == "__main__":
    main()
