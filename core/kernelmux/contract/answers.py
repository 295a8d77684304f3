"""What a backend answered, checked: kernels and refusals under their full names, or a line that says what was wrong.

Enters: a hook's answer, or a backend's kernel classes and a node. Leaves: an Offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import getattr_static, signature
from numbers import Integral
from types import FunctionType
from typing import TYPE_CHECKING, Any

from kernelmux.contract.device import Device
from kernelmux.contract.kernel import EVERY_OP, CurrentStream, Declined, Efficiency, Kernel, Launch, ReasonKind, Tensors
from kernelmux.contract.names import check_kernel_name
from kernelmux.errors import BackendError, nearest, place
from kernelmux.graph.domain import admits, in_words, parse_range
from kernelmux.graph.formats import FORMATS, Value, Weight
from kernelmux.graph.graph import TensorNode, case_node
from kernelmux.graph.ops import OPS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Offer:
    """What backends answered for one node: kernels by full name, best first in each backend, and refusals."""

    kernels: Mapping[str, Kernel]
    declined: Mapping[str, Declined]

    @property
    def names(self) -> list[str]:
        """The kernels that are mentioned."""
        return [name for name in (*self.kernels, *self.declined) if ":" in name]


def checked_classes(backend: str, answer: Any) -> tuple[type[Kernel], ...]:
    """What a backend's `kernel_classes` returned; BackendError where it is no list of sound classes."""
    function = f"{backend}.kernel_classes()"
    listed = _listed(function, answer, "a list of Kernel classes, [MyKernel]")
    seen: list[tuple[object, ...]] = []
    for kernel in listed:
        if not (isinstance(kernel, type) and issubclass(kernel, Kernel)):
            raise BackendError(f"{function} lists {_shown(kernel)}: it must list Kernel classes, [MyKernel]")
        _check_declarations(backend, kernel)
        subject = f"{backend}:{kernel.name}"
        if missing := sorted(kernel.__abstractmethods__):
            raise BackendError(f"{subject} has no {missing[0]}: a kernel must define it")
        if isinstance(ops := getattr(kernel, "ops", ()), str):
            raise BackendError(f"{subject}.ops must be a tuple of names, ({ops!r},)")
        if not kernel.ops:
            raise BackendError(f"{subject}.ops names no op: say which it implements, as ops = ('add',)")
        for op in kernel.ops:
            if op not in OPS and op != EVERY_OP:
                raise BackendError(f"{subject}.ops: unknown op {op!r}{nearest(op, OPS)}")
            # One name may stand for several classes, on different devices or for different arguments.
            if (same := (op, kernel.name, kernel.devices, kernel.takes)) in seen:
                raise BackendError(f"two kernels of {op} are named {subject}")
            seen.append(same)
        if not isinstance(kernel.takes, Mapping):
            raise BackendError(f"{subject}.takes must be a dict, {{'m': '..64'}}, not {_shown(kernel.takes)}")
        told = {name for op in kernel.ops if op != EVERY_OP for name in OPS[op].told}
        if odd := kernel.takes.keys() - told:
            raise BackendError(f"{subject}.takes: no op of its is told {min(odd)!r}{nearest(min(odd), told)}")
        for name, allowed in kernel.takes.items():
            if fault := _range_fault(kernel.ops, name, allowed):
                raise BackendError(f"{subject}.takes: {fault}")
    return tuple(listed)


def _range_fault(ops: Sequence[str], name: str, allowed: object) -> str:
    """What is wrong with what a kernel takes of a number: words that are no range, or a range in a list."""
    listed = isinstance(allowed, list | tuple)
    for word in tuple(allowed) if isinstance(allowed, list | tuple) else (allowed,):
        if not isinstance(word, str) or word in FORMATS or (_is_range(word) and not listed):
            continue
        tellers = (OPS[op] for op in ops if op in OPS and name in OPS[op].told)
        told = [op.told[name](case_node(next(iter(op.cases())))) for op in tellers]
        if any(isinstance(value, int | float) and not isinstance(value, bool) for value in told):
            what = "in a list is none" if listed else "is no range: write 5, '1..16', '17..' or '..16'"
            return f"{name} is a number, {word!r} {what}"
    return ""


def _is_range(word: str) -> bool:
    try:
        return ".." in word and bool(parse_range(word))
    except ValueError:
        return False


def dispatch(
    backend: str, classes: Sequence[type[Kernel]], node: TensorNode, device: Device
) -> list[Kernel | Declined]:
    """What the hook of the node's op answers for a backend of these classes: each kernel, or why not."""
    early: list[Kernel] = []
    late: list[Kernel] = []
    refused: dict[str, tuple[int, Declined]] = {}
    told = node.contract.arguments(node)
    for made in classes:
        if node.op not in made.ops and EVERY_OP not in made.ops:
            continue
        kernel = made()
        kernel.device = device
        outside = excluded(kernel, told)
        refusal: Any = outside or kernel.refuses(node)
        if not isinstance(refusal, Declined | None):
            subject = f"{backend}:{kernel.name}"
            raise BackendError(f"{subject}.refuses returned {_shown(refusal)}: it must return Declined(reason) or None")
        if refusal is None:
            (late if kernel.comes_late(node) else early).append(kernel)
            continue
        # Of several classes of one name the one that fits the node best knows why.
        fits = 2 if outside is None else int(refusal.kind not in ("device", "capability"))
        if fits > refused.get(kernel.name, (-1, refusal))[0]:
            refused[kernel.name] = fits, replace(refusal, kernel=kernel.name)
    offered = {kernel.name for kernel in (*early, *late)}
    return [*early, *late, *(refusal for name, (_, refusal) in refused.items() if name not in offered)]


def excluded(kernel: Kernel, told: Mapping[str, Any]) -> Declined | None:
    """Why a kernel's declarations exclude a node of which its hook would be told this."""
    device = kernel.device
    if kernel.devices and device.kind not in kernel.devices:
        return Declined(f"it runs on {in_words(kernel.devices)}, the plan is for {device.kind}", "device")
    if device.capability is not None and device.capability < kernel.capability:
        least, has = (".".join(map(str, version)) for version in (kernel.capability, device.capability))
        return Declined(f"it needs compute capability {least}, {device.name} has {has}", "capability")
    for name, allowed in kernel.takes.items():
        if name in told and not admits(allowed, told[name]):
            # What a hook is told in words are formats.
            words = told[name] if isinstance(told[name], tuple) else (told[name],)
            kind: ReasonKind = "format" if all(isinstance(word, str) for word in words) else "shape"
            noun, is_format, _ = name.partition("_format")
            what = f"{noun}s in {in_words(allowed)}" if is_format else f"{name} {in_words(allowed)}"
            return Declined(f"it takes {what}, not {in_words(told[name])}", kind)
    return None


def checked_list(function: str, answer: Any, kind: type) -> Sequence[Any]:
    """What `new_ops` or `new_formats` returned; BackendError where it is no list of these."""
    listed = _listed(function, answer, f"a list of {kind.__name__}s")
    for brought in listed:
        if not isinstance(brought, kind):
            raise BackendError(f"{function} lists {_shown(brought)}: it must list instances of {kind.__name__}")
    return listed


def checked_answer(backend: str, function: str, answer: Any) -> Offer:
    """A hook's answer under full names; BackendError where it is not what a hook may answer."""
    kernels: dict[str, Kernel] = {}
    declined: dict[str, Declined] = {}
    for part in answer if isinstance(answer, list | tuple) else [answer]:
        if isinstance(part, Declined):
            declined[f"{backend}:{part.kernel}" if part.kernel else backend] = part
        elif isinstance(part, Kernel):
            _check_declarations(backend, part)
            part.backend = backend
            if part.full_name in kernels:
                raise BackendError(f"two kernels of this op are named {part.full_name}")
            kernels[part.full_name] = part
        else:
            raise BackendError(f"{function} answered with {_shown(part)}: it must answer with MyKernel() or Declined")
    return Offer(kernels, declined)


def checked_formats(kernel: Kernel, node: TensorNode) -> Mapping[str, Sequence[Sequence[str]]]:
    """What a kernel's `inputs` and `outputs` returned; BackendError where that is no list of formats for each."""
    name, answers = kernel.full_name, {"inputs": kernel.inputs(node), "outputs": kernel.outputs(node)}
    for what, values in (("inputs", node.inputs), ("outputs", node.outputs)):
        formats = answers[what]
        listed = isinstance(formats, list | tuple) and all(isinstance(each, list | tuple) for each in formats)
        if not listed:
            shown = repr(formats) if formats else _shown(formats)
            raise BackendError(f"{name}.{what} must give a list of formats for each, as [['f32']], not {shown}")
        if len(formats) != len(values) or not all(formats):
            raise BackendError(f"{name}.{what} must give formats for each of {len(values)} {what} of a {node.op}")
        if unknown := [format for each in formats for format in each if format not in FORMATS]:
            raise BackendError(f"{name}.{what}: unknown format {unknown[0]!r}{nearest(unknown[0], FORMATS)}")
    return answers


def checked_variants(kernel: Kernel, node: TensorNode) -> Mapping[str, Any]:
    """What a kernel's `variants` returned, by their names; BackendError where that is no list."""
    listed = _listed(f"{kernel.full_name}.variants", kernel.variants(node), "a list, [] for none")
    return {str(variant): variant for variant in listed}


def checked_work(kernel: Kernel, node: TensorNode) -> str:
    """What a kernel's `work` returned; BackendError where that is no str."""
    work: Any = kernel.work(node)
    if not isinstance(work, str):
        wanted = "it must return a str, which nodes of the same work have in common"
        raise BackendError(f"{kernel.full_name}.work returned {_shown(work)}: {wanted}")
    return work


def checked_workspace(kernel: Kernel, node: TensorNode) -> int:
    """What a kernel's `workspace` returned; BackendError where that is no number of bytes."""
    nbytes: Any = kernel.workspace(node)
    if type(nbytes) is bool or not isinstance(nbytes, Integral) or nbytes < 0:
        raise BackendError(
            f"{kernel.full_name}.workspace returned {_shown(nbytes)}: it must return a number of bytes, 0 for none",
            node=node.name,
            kernel=kernel.full_name,
        )
    return int(nbytes)


def stored(node: TensorNode, kernel: Kernel, wanted: Callable[[str, Value], str]) -> TensorNode:
    """The node with each value, as `inputs0`, in the format `wanted` of it, or the kernel's best if it has not that."""

    declared = checked_formats(kernel, node)

    def settled(side: str, values: Sequence[Value]) -> Iterator[Value]:
        for index, (value, formats) in enumerate(zip(values, declared[side], strict=True)):
            format = wanted(f"{side}{index}", value)
            yield value.stored(format if format in formats else formats[0])

    inputs = tuple(settled("inputs", node.inputs))
    outputs = tuple(settled("outputs", node.outputs))
    if kernel.joins(node):
        # One matrix has one format.
        outputs = tuple(value.stored(outputs[0].format) for value in outputs)
    return node.on(inputs, outputs)


def prepared(kernel: Kernel, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
    """What a kernel's `prepare` returned; BackendError where that is no tuple of tensors."""
    import torch

    packed: Any = kernel.prepare(weights, device)
    if isinstance(packed, list | tuple) and all(isinstance(part, torch.Tensor) for part in packed):
        return tuple(packed)
    raise BackendError(
        f"{kernel.full_name}.prepare returned {_shown(packed)}: it must return a tuple of tensors, () for none",
        kernel=kernel.full_name,
    )


def bound(kernel: Kernel, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
    """What a kernel's `bind` returned; BackendError where that cannot be called."""
    launch = kernel.bind(node, tensors, stream)
    if not callable(launch):
        raise BackendError(
            f"{kernel.full_name}.bind returned {_shown(launch)}: "
            "it must return a call without arguments that enqueues the work",
            node=node.name,
            kernel=kernel.full_name,
        )
    return launch


def _listed(function: str, answer: Any, wanted: str) -> Sequence[Any]:
    """The list that a function returned; BackendError where that is none."""
    if isinstance(answer, list | tuple):
        return answer
    raise BackendError(f"{function} returned {_shown(answer)}: it must return {wanted}")


def _shown(answer: Any) -> str:
    """What was returned, and the likeliest mistake behind it."""
    if answer is None:
        return "None (is a `return` missing?)"
    if isinstance(answer, type):
        return f"the class {answer.__name__}"
    if isinstance(answer, Kernel):
        return f"an instance of {type(answer).__name__}"
    return f"{' '.join(repr(answer).split()):.40} ({type(answer).__name__})"


def _check_declarations(backend: str, kernel: Kernel | type[Kernel]) -> None:
    """BackendError where a kernel's declarations are missing or cannot be meant, or its methods cannot be called."""
    made = kernel if isinstance(kernel, type) else type(kernel)
    name, precision = getattr(kernel, "name", None), getattr(kernel, "precision", None)
    check_kernel_name(f"{backend}:{made.__name__}", name)
    if isinstance(precision, bool) or not isinstance(precision, int | float) or not precision >= 0:
        raise BackendError(f"{backend}:{name}.precision must be a bound on the NMSE, not {precision!r}")
    if fault := _declared_fault(made) or _signature_fault(made):
        raise BackendError(f"{backend}:{name}.{fault}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_DECLARED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "efficiency": (lambda value: isinstance(value, Efficiency), "an Efficiency(reading=0.7, multiplying=0.3)"),
    "launches": (_is_count, "a number of launches"),
    "devices": (
        lambda value: isinstance(value, list | tuple) and all(isinstance(kind, str) for kind in value),
        "a tuple of kinds, ('cpu',)",
    ),
    "version": (lambda value: isinstance(value, str), "a str"),
    "packed": (lambda value: isinstance(value, str), "a str"),
    "rounds_to": (lambda value: value == "" or value in FORMATS, "the name of a format, as 'bf16', or ''"),
}
"""What a declaration is where it can be meant, and how it is said."""


@cache
def _declared_fault(made: type[Kernel]) -> str:
    """The first of a class's declarations that cannot be meant; what is a property is known of an instance alone."""
    for what, (sound, wanted) in _DECLARED.items():
        value = getattr(made, what)
        if not hasattr(value, "__get__") and not sound(value):
            return f"{what} must be {wanted}, not {_shown(value)}"
    return ""


@cache
def _signature_fault(made: type[Kernel]) -> str:
    """The first method of a class that cannot be called as its base's, where it stands, and how it is called."""
    for base in (Kernel, CurrentStream):
        for method, stated in vars(base).items():
            own = getattr_static(made, method, None)
            if method.startswith("_") or own is stated or not issubclass(made, base):
                continue
            if isinstance(stated, FunctionType) and isinstance(own, FunctionType):
                asked = signature(stated).parameters
                try:
                    signature(own).bind(*asked)
                except TypeError:
                    at = place(own.__code__.co_filename, own.__code__.co_firstlineno)
                    return f"{method}{_parameters(own)} must take ({', '.join(asked)}) ({at})"
    return ""


def _parameters(function: FunctionType) -> str:
    return f"({', '.join(map(str, signature(function).parameters.values()))})"
