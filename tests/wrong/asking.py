"""Kernels that do what they may not while they are asked, and kernels that take values side by side for whole rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from wrong.kernel import Right, planted


@planted("add", "asking")
class NotesWhatItIsAsked(Right):
    """Keeps a list of the nodes that it was asked about."""

    def inputs(self, node):
        Path(tempfile.gettempdir(), "kernelmux-asked.txt").write_text(node.op)
        return super().inputs(node)


@planted("mul_mat", "asking")
class MakesAFolderForItsCode(Right):
    """Makes the place where it would keep compiled code."""

    def workspace(self, node):
        Path(tempfile.gettempdir(), "kernelmux-code").mkdir(exist_ok=True)
        return 0


class Strided(Right):
    """Reads inputs by their row stride."""

    strided = True


@planted("swiglu", "strided")
class TakesRowsForNeighbours(Strided):
    """Reads as if each row began where the last one ends."""

    def dense(self, value, planes):
        rows, columns = value.extents
        return torch.as_strided(planes, (rows, columns), (columns, 1)).double()


class SideBySide(Right):
    """Writes all outputs as one matrix."""

    side_by_side = True

    def write(self, node, tensors, results):
        first = tensors.outputs[0]
        width = sum(result.shape[1] for result in results)
        first.as_strided((len(first), width), (width, 1)).copy_(torch.cat(results, dim=1))


@planted("qkv", "error")
class WritesEachOutputWhereTheFirstBegins(SideBySide):
    """Takes the matrix for the first output's own memory."""

    def write(self, node, tensors, results):
        first = tensors.outputs[0]
        for result in results:
            first.as_strided(result.shape, (result.shape[1], 1)).copy_(result)
