"""The Triton kernels on machines without a GPU: each `interpreted_*.py` in a process where Triton interprets."""

from pathlib import Path

import pytest

from interpreted import assert_passes

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_triton_kernels_under_the_interpreter(file):
    assert_passes(file)
