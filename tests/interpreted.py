"""Files of tests whose Triton kernels run without a GPU: each in a process where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def assert_passes(file):
    """All of the file's tests pass, and some are there; skipped where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton, which interprets the kernels, is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    # A file whose every case is refused is a success to pytest.
    assert " passed" in done.stdout, done.stdout
