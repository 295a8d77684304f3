"""Asking for kernels depends on the node and the device alone, and leaves nothing behind: all backends at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from command import TIMEOUT, clean_environment

DEVICES = ("cpu", "cpu avx2", "cpu amx", "cuda sm_90 NVIDIA H200", "cuda sm_80 NVIDIA A100", "rocm gfx942 MI300X")
ASK = """
import sys
from kernelmux.conformance.hookup import all_cases
from kernelmux.contract import registry
from kernelmux.contract.device import described_device
from kernelmux.graph.graph import case_node

found = registry.current()
for words in sys.argv[1:]:
    device = described_device(words)
    for case in all_cases():
        if "smoke" not in case.marks:
            continue
        node = case_node(case)
        offer = found.offer(node, device)
        for name, kernel in sorted(offer.kernels.items()):
            names = [str(one) for one in kernel.variants(node)]
            told = (kernel.precision, kernel.packed, kernel.version, kernel.packed_bytes(node), names)
            print(words, case.name, name, *told)
        for name, why in sorted(offer.declined.items()):
            print(words, case.name, name, why.kind, why.reason)
assert not any(backend.fault for backend in found.backends.values())
if "torch" in sys.modules:
    assert not sys.modules["torch"].cuda.is_initialized()
"""


def answers(seed: str, home: Path) -> list[str]:
    environment = clean_environment() | {"PYTHONHASHSEED": seed, "XDG_CACHE_HOME": str(home), "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK, *DEVICES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_every_backend_answers_alike_in_two_processes_and_writes_no_file(tmp_path: Path):
    pytest.importorskip("triton")
    first = answers("0", tmp_path)
    assert first == answers("1", tmp_path)
    # CuPy makes an empty folder of its own as it is imported.
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    offered = {(words, line.split(":")[0]) for line in first for words in DEVICES if line.startswith(words)}
    assert len(offered) > 1000
    for words in (words for words in DEVICES if words.startswith("cuda")):
        assert any(line.startswith(words) and " torch:bf16 " in line for line in first)
        assert any(line.startswith(words) and " triton:f32 " in line for line in first)
        assert any(line.startswith(words) and " cupy:dp4a " in line for line in first)
