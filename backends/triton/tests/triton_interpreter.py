"""Triton's interpreter, mended where it rounds wrongly, and the cases of a backend on it.

For files that run under TRITON_INTERPRET=1, in processes of their own: Triton reads the variable when kernels are made.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from kernelmux.conformance.testing import few_rows

TORCH_TYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
TORCH_TYPES[tl.float8e4nv] = torch.float8_e4m3fn


def interpreted_jobs(plugin, rows=5):
    """As `few_rows`, of a backend whose Triton kernels are interpreted on CPU tensors."""
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
    return few_rows(plugin, rows)


def _convert_float(values, source, target, rounding):
    """Through torch: the interpreter's own conversion loses the carry of a mantissa that rounds up to two."""
    bits = torch.from_numpy(np.ascontiguousarray(values))
    rounded = bits.view(TORCH_TYPES[source]).to(TORCH_TYPES[target])
    return rounded.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[rounded.itemsize]).numpy()


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Of bfloat16 the interpreter would multiply the bits."""
    wide = [_convert_float(part.data, part.dtype, tl.float32, None).view(np.float32) for part in (a, b)]
    return interpreter.TensorHandle(np.matmul(*wide) + d.data, d.dtype.scalar)
