"""The Triton kernels on machines without a GPU: each `interpreted_*.py` in a process where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(HERE.glob("interpreted_*.py")), ids=lambda file: file.stem)
def test_triton_kernels_under_the_interpreter(file):
    pytest.importorskip("triton", reason="Triton, which interprets the kernels, is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    # A file whose every case is refused is a success to pytest.
    assert " passed" in done.stdout, done.stdout
