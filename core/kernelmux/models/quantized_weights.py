"""The weights of a quantised folder, each made of several tensors: integers or FP8 numbers, scales, zero points.

Enters: a folder's tensors by name. Leaves: weights by name, `MODULE.weight`, read and unpacked when they are packed;
ModelError names a tensor that is missing, of another shape, or that would be ignored.
Layouts: https://github.com/vllm-project/compressed-tensors and
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from kernelmux.graph.formats import human_bytes, lookup
from kernelmux.models.int4_weights import awq_weight, compressed_weight, gptq_weight
from kernelmux.models.module import Module
from kernelmux.models.mxfp4_weights import compressed_mxfp4, expert_parameters
from kernelmux.models.quantization import Quantization
from kernelmux.models.safetensors import DTYPES, ITEMS, plain_weight
from kernelmux.models.stored import StoredPlane, StoredWeight, made_plane

UNUSED = ("input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")
"""Scales of activations and caches, which are stored as kernels and policies choose."""
SCALES = ("fp8_128x128", "fp8_row", "fp8_tensor")
"""Formats of e4m3, by their scales: the first that a weight's are alike."""
FLOATS = tuple(ITEMS[dtype] for dtype in DTYPES)


def quantized_weights(
    path: Path, planes: Mapping[str, StoredPlane], quantization: Quantization
) -> dict[str, StoredWeight]:
    """The weights of a folder's tensors; what no weight is made of keeps its name, if it is of floats."""
    modules: dict[str, Module] = {}
    for name, plane in planes.items():
        before, _, end = name.rpartition(".")
        modules.setdefault(before, Module(path, before, {})).parts[end] = plane
    weights: dict[str, StoredWeight] = {}
    for module in modules.values():
        weights |= {weight.name: weight for weight in _quantized(module, quantization)}
        for end, plane in module.parts.items():
            if end in UNUSED:
                continue
            if plane.dtype not in FLOATS or not plane.shape:
                module.fail(f"tensor {end} of {plane.dtype} {list(plane.shape)} is not built in; it would be ignored")
            name = f"{module.name}.{end}" if module.name else end
            weights[name] = plain_weight(name, plane)
    return weights


def _quantized(module: Module, quantization: Quantization) -> list[StoredWeight]:
    """The module's quantised weight, if it has one; of experts that are parameters several."""
    if quantization.method == "mxfp4":
        return expert_parameters(module)
    if "qweight" in module.parts and quantization.method == "awq":
        return [awq_weight(module)]
    if "qweight" in module.parts and quantization.method == "gptq":
        return [gptq_weight(module, quantization.zeros_one_less)]
    if "weight_packed" in module.parts:
        of_bytes = module.parts["weight_packed"].dtype == "uint8"
        return [compressed_mxfp4(module) if of_bytes else compressed_weight(module)]
    if "weight" in module.parts and module.parts["weight"].dtype == "float8_e4m3fn":
        return [_fp8(module)]
    return []


def _fp8(module: Module) -> StoredWeight:
    """e4m3 with one scale, one a row, or one for 128 rows and columns: a number is its value times its scale."""
    data, scale = module.take("weight"), module.take("weight_scale_inv", "weight_scale")
    if len(data.shape) != 2:
        module.fail(f"its weight is {list(data.shape)}; a matrix is needed")
    alike = [format for format in SCALES if scale.shape in _scale_shapes(format, data.shape)]
    if not alike:
        told = "one, one a row, or one for 128 rows and columns are built in"
        module.fail(f"its weight is {list(data.shape)} with scales {list(scale.shape)}; {told}")
    faults = {format: lookup(format).check(data.shape) for format in alike}
    format = next((format for format, fault in faults.items() if fault is None), None)
    if format is None:
        module.fail(str(faults[alike[0]]))
    scales = _as_float32(module, scale, lookup(format).planes[1].shape(data.shape))
    return StoredWeight(f"{module.name}.weight", data.shape, format, (data, scales))


def held_plainly(weights: Iterable[StoredWeight]) -> tuple[str, ...]:
    """Which quantised weights are held as plain numbers, and what they take: one line, or none."""
    made = [weight for weight in weights if lookup(weight.format).plain and _sources(weight) != weight.stored]
    if not made:
        return ()
    names = sorted({re.sub(r".*\.layers\.\d+\.|\.weight$", "", weight.name) for weight in made})
    before = human_bytes(sum(plane.nbytes for weight in made for plane in _sources(weight)))
    now = human_bytes(sum(weight.nbytes for weight in made))
    told = f"{len(made)} matrices ({', '.join(names)}) are held as float32, in {now} instead of {before}"
    reason = "as inputs of a group do not lie together (act-order)"
    return (f"{told}, {reason}; `kernelmux quantize` stores them smaller",)


def _sources(weight: StoredWeight) -> tuple[StoredPlane, ...]:
    return tuple(source for plane in weight.stored if isinstance(plane, StoredPlane) for source in plane.sources)


def _scale_shapes(format: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes in which files have a format's scales of a weight: also without axes of one."""
    rows, columns = lookup(format).planes[1].shape(shape)
    return [(rows, columns)] + ([] if format == "fp8_128x128" else [(rows,)] if rows > 1 else [(1,), ()])


def _as_float32(module: Module, plane: StoredPlane, shape: tuple[int, ...]) -> StoredPlane:
    """A plane of floats in another shape of as many, in float32."""
    if plane.dtype not in FLOATS:
        module.fail(f"its scales are stored as {plane.dtype}; floats are read")
    if plane.dtype == "float32":
        return replace(plane, shape=shape)
    return made_plane("float32", shape, (plane,), lambda numbers: numbers.float())


def with_scales_of_rows(weight: StoredWeight) -> StoredWeight:
    """A weight with one scale as one with a scale a row, which is the same of each; others as they are."""
    if weight.format != "fp8_tensor":
        return weight
    data, scale = weight.stored
    assert isinstance(scale, StoredPlane)
    n = weight.shape[0]
    rows = made_plane("float32", (n, 1), (scale,), lambda one: one.expand(n, 1))
    return StoredWeight(weight.name, weight.shape, "fp8_row", (data, rows))
