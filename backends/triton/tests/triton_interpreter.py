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
from triton.language import core
from triton.language.semantic import TritonSemantic
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
    interpreter._get_np_dtype = _numpy_type
    core.dtype.__eq__ = _same_type
    core.block_type.__init__ = _make_block_type
    core.tensor.__init__ = _make_tensor
    TritonSemantic.broadcast_impl_value = _broadcast


_equal_types, _make_new_block_type = core.dtype.__eq__, core.block_type.__init__
_make_new_tensor, _broadcast_unlike = core.tensor.__init__, TritonSemantic.broadcast_impl_value
_find_numpy_type = interpreter._get_np_dtype


def _extents(type):
    """What a tensor of a type has beside its contents."""
    tensor = object.__new__(core.tensor)
    _make_new_tensor(tensor, None, type)
    return {"shape": tensor.shape, "numel": tensor.numel}


_OF_SCALARS = _extents(tl.int32)
_SHAPED = {}
"""By element and shape: what a block type holds, and tensors of it; making that takes longer than most operations."""
_NUMPY_TYPES = {}


def _same_type(self, other):
    return self is other or (self.name == other.name if type(other) is core.dtype else _equal_types(self, other))


def _numpy_type(type):
    name = type.scalar.name
    if name not in _NUMPY_TYPES:
        _NUMPY_TYPES[name] = _find_numpy_type(type)
    return _NUMPY_TYPES[name]


def _make_block_type(self, element_ty, shape):
    key = element_ty.name, *(e if type(e) is int else core._unwrap_if_constexpr(e) for e in shape)
    if key not in _SHAPED:
        _make_new_block_type(self, element_ty, shape)
        self.of_tensors = _extents(self)
        _SHAPED[key] = {name: value for name, value in self.__dict__.items() if name != "element_ty"}
    self.element_ty = element_ty
    self.__dict__.update(_SHAPED[key])


def _make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.__dict__.update(type.of_tensors if type.is_block() else _OF_SCALARS)


def _broadcast(self, lhs, rhs):
    """Two blocks of one shape need not be compared extent by extent."""
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _broadcast_unlike(self, lhs, rhs)


def _convert_float(values, source, target, rounding):
    """Through torch: the interpreter's own conversion loses the carry of a mantissa that rounds up to two."""
    bits = torch.from_numpy(np.ascontiguousarray(values))
    rounded = bits.view(TORCH_TYPES[source]).to(TORCH_TYPES[target])
    return rounded.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[rounded.itemsize]).numpy()


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Of bfloat16 the interpreter would multiply the bits."""
    wide = [_convert_float(part.data, part.dtype, tl.float32, None).view(np.float32) for part in (a, b)]
    return interpreter.TensorHandle(np.matmul(*wide) + d.data, d.dtype.scalar)
