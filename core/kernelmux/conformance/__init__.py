"""Runs the ops' cases on any kernel: draw the inputs, walk a graph of one node, compare with float64.

Enters: a Case and a kernel's name. Leaves: the error (NMSE) of each output and the bound that it must keep.
"""

from __future__ import annotations

from kernelmux.conformance.run import CaseResult, Refused, run_case

__all__ = ["CaseResult", "Refused", "run_case"]
