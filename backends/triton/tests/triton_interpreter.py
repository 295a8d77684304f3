"""Triton's interpreter, mended where it rounds wrongly, and the cases of a backend on it.

For files that run under TRITON_INTERPRET=1, in processes of their own: Triton reads the variable when kernels are made.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from kernelmux.conformance.testing import few_rows

if not knobs.runtime.interpret:
    pytest.skip("Triton compiles unless TRITON_INTERPRET=1 is set", allow_module_level=True)

TORCH_TYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
TORCH_TYPES[tl.float8e4nv] = torch.float8_e4m3fn


def interpreted_jobs(plugin, rows=5):
    """As `few_rows`, of a backend whose Triton kernels are interpreted on CPU tensors."""
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
    _hasten()
    return few_rows(plugin, rows)


def _hasten():
    """Leaves out what takes most of the interpreter's time and changes nothing."""
    # The language is put in its place once, and not at each call of a function by a kernel.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    # Whether an integer overflows would be computed, and then asserted under `debug` alone.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _convert_float(values, source, target, rounding):
    """Through torch: the interpreter's own conversion loses the carry of a mantissa that rounds up to two."""
    bits = torch.from_numpy(np.ascontiguousarray(values))
    rounded = bits.view(TORCH_TYPES[source]).to(TORCH_TYPES[target])
    return rounded.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[rounded.itemsize]).numpy()


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Of bfloat16 the interpreter would multiply the bits."""
    wide = [_convert_float(part.data, part.dtype, tl.float32, None).view(np.float32) for part in (a, b)]
    return interpreter.TensorHandle(np.matmul(*wide) + d.data, d.dtype.scalar)
