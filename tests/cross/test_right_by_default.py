"""Without a policy, and right: what the default says of SmolLM2 is near float32, on each class of processor.

This processor is asked over less text; it is limited to older ones in processes of their own, over all of the text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import default_figures
import kernelmux
from command import TIMEOUT, clean_environment
from kernelmux.contract.device import described_device
from kernelmux.run.model import load_random

MOST_DIVERGENCE = 2e-3
"""Nats a token. llama.cpp's 8-bit activations cost 5e-3 on the same file."""
MOST_GAP = 0.1
"""Between float32's two best logits, where another token may be taken."""

Figures = Mapping[str, Any]
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
CLASSES: dict[str, tuple[dict[str, str], bool]] = {
    "own": ({}, True),
    "avx2": ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, True),
    "avx512": ({"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, AVX512),
    "avx512_bf16": (
        {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        AVX512 and torch.cpu._is_avx512_bf16_supported(),
    ),
    # Where there are such units, oneDNN takes them unless told otherwise.
    "amx": ({}, AVX512 and torch.cpu._is_amx_tile_supported()),
}
"""What makes torch and oneDNN those of a class, and whether this processor can be of it."""


def check_answers(found: Figures) -> None:
    for question, (by_default, exact) in found["answers"].items():
        assert by_default == exact, question
    assert found["answers"]["What is the capital of France?"][0] == "The capital of France is Paris."


def check_divergence(found: Figures) -> None:
    assert 0 <= found["prompts"] <= MOST_DIVERGENCE, found
    assert 0 <= found["decoding"] <= MOST_DIVERGENCE, found


def check_continuations(found: Figures) -> None:
    """The default's tokens are float32's up to where two are nearly as likely; an exact plan's are to the end."""
    assert found["continuations"]
    for each in found["continuations"]:
        assert each["default"]["gap"] <= MOST_GAP, found["continuations"]
        assert each["exact"]["same"] == each["tokens"], found["continuations"]


def check_storage(found: Figures) -> None:
    assert found["stored"] == {"exact": "f32", "logits": ["f32"]}


CHECKS = (check_answers, check_divergence, check_continuations, check_storage)


@pytest.mark.model
@pytest.mark.slow
def test_the_default_is_right_on_this_processor(smollm2: Path):
    """Over some of the text, and of the recorded answers; one test, for the figures take their time."""
    some = default_figures.GOLDENS[::3]
    found = default_figures.figures(kernelmux.load(smollm2), tokens=256, decoded=32, cases=some)
    for check in CHECKS:
        check(found)


def asked(model: Path, limits: tuple[tuple[str, str], ...]) -> Figures:
    """The figures in a process of its own, where the limits act."""
    command = [sys.executable, "-W", "error", default_figures.__file__, str(model), "2048", "200"]
    # Threads of two processes beside each other cost far more than they save.
    env = clean_environment({**dict(limits), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")})
    env = {name: value for name, value in env.items() if value}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found: Figures = json.loads(done.stdout)
    return found


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_the_default_is_right_on_every_class_of_processor(smollm2: Path, name: str):
    limits, possible = CLASSES[name]
    if not possible:
        pytest.skip(f"this processor has no {name}, and cannot be limited to it")
    found = asked(smollm2, tuple(limits.items()))
    if "ATEN_CPU_CAPABILITY" in limits:
        assert found["capability"] == limits["ATEN_CPU_CAPABILITY"].upper()
    for check in CHECKS:
        check(found)


@pytest.mark.parametrize("words", ["cpu", "cpu avx512_bf16", "cuda sm_90 NVIDIA H200"])
@pytest.mark.parametrize("shape", ["smollm2-135m:Q4_1", "llama-1b:bf16", "llama-8b:Q4_K_M"])
def test_logits_are_written_in_float32_so_that_rounding_makes_no_ties_of_them(words: str, shape: str):
    """Not written in less and widened: the product's own output is."""
    plan = load_random(shape).plan(use=["*=auto"], device=described_device(words))
    assert default_figures.logit_formats(plan) == ["f32"]
    for schedule in plan.schedules.values():
        assert schedule.outputs == ("logits",)


@pytest.mark.model
def test_logits_pass_through_no_shorter_format_on_their_way(smollm2: Path):
    """What was rounded to bfloat16 and widened again has ties that float32 has not."""
    model = kernelmux.load(smollm2)
    ids = model.encode("The capital of France is")
    for rows in (ids, ids[:1]):
        logits = model.forward(rows, model.plan())[-1]
        assert not logits.equal(logits.bfloat16().float())
