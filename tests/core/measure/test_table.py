"""Tables of what was measured: of kernels whose module ships none."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from command import TIMEOUT, clean_environment

SCRIPT = """
    from kernelmux.contract import Kernel
    from kernelmux.contract.device import find_device
    from kernelmux.graph.formats import Value
    from kernelmux.graph.graph import make_node
    from kernelmux.measure.table import Tables

    class Silu(Kernel):
        ops, name, precision, devices = ("silu",), "mine", 1e-6, ("cpu",)

        def bind(self, node, tensors, stream):
            raise AssertionError("nobody asked for it")

    node = make_node("silu", "y", Value("x", (1, 64)))
    print(Tables(find_device("cpu")).time(Silu(), node, 1, 512))
"""


@pytest.mark.parametrize("typed", [False, True], ids=["script", "notebook"])
def test_kernels_of_a_script_or_a_notebook_have_no_shipped_tables(tmp_path: Path, typed: bool):
    """As in a notebook, what is read from stdin has no file."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    ran = subprocess.run(
        [sys.executable, *([] if typed else ["script.py"])],
        input=(tmp_path / "script.py").read_text() if typed else "",
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=tmp_path,
        env=clean_environment({"KERNELMUX_CACHE": str(tmp_path / "cache")}),
        check=False,
    )
    assert (ran.stdout, ran.returncode) == ("None\n", 0), ran.stderr
