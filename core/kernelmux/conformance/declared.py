"""What a kernel declares, as far as it shows without a launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelmux.conformance.asking import watched
from kernelmux.conformance.guarded import same
from kernelmux.contract.answers import checked_work
from kernelmux.contract.kernel import Kernel
from kernelmux.contract.packed import packed_key
from kernelmux.errors import contained
from kernelmux.graph.formats import Value

if TYPE_CHECKING:
    from kernelmux.conformance.trial import Trial
    from kernelmux.contract.registry import Registry
    from kernelmux.graph.graph import TensorNode


LOOSEST = 1e-2
"""The largest bound that says anything: zeros have an NMSE of 1."""


def pure(trial: Trial, backend: str, registry: Registry, node: TensorNode) -> None:
    """Asking changes nothing: no file, process or memory comes of it, and the answer is the same again."""
    kernel, device = trial.kernel, trial.device
    with watched(device) as seen:
        again = registry.offer(node, device, only=backend).kernels.get(f"{backend}:{kernel.name}")
        for asked in (kernel.inputs, kernel.outputs, kernel.packed_bytes, kernel.workspace, kernel.variants):
            asked(trial.node)
        if kernel.variants(trial.node):
            checked_work(kernel, trial.node)
    trial.failures += [f"asking: while it is asked, {backend} {what}" for what in dict.fromkeys(seen)]
    if type(again) is not type(kernel):
        trial.failures.append(f"asking: asked again for the same node, {backend} answers otherwise")


def precision(trial: Trial) -> None:
    """The bound on the error is one."""
    if trial.kernel.precision > LOOSEST:
        trial.failures.append(
            f"declarations: a precision of {trial.kernel.precision:g} says nothing: at most {LOOSEST:g} does"
        )


def symbols(trial: Trial) -> None:
    """A plan asks for formats and packed bytes before it knows the row count: the answers do not depend on it."""
    node, kernel = trial.node, trial.kernel
    rows = node.inputs[0].extents[0]

    def open_rows(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(replace(v, shape=("m", *v.shape[1:])) if v.shape[0] == rows else v for v in values)

    unbound = replace(node, inputs=open_rows(node.inputs), outputs=open_rows(node.outputs))
    for method in ("inputs", "outputs", "packed_bytes"):
        try:
            alike = _plain(getattr(kernel, method)(unbound)) == _plain(getattr(kernel, method)(node))
        except BaseException as error:
            contained(error)
            trial.failures.append(f"declarations: {method} raises where the row count is the symbol m: {error}")
            continue
        if not alike:
            trial.failures.append(f"declarations: {method} depends on the row count, which may be a symbol")


def _plain(declared: object) -> object:
    """Formats as tuples: a kernel may answer with any sequence."""
    return declared if isinstance(declared, int) else tuple(tuple(formats) for formats in declared)  # type: ignore[attr-defined]


def packed_name(trial: Trial, name: str, others: Mapping[str, Kernel]) -> None:
    """Kernels that name the same packed form make the same bytes: whichever comes first packs for all of them."""
    key = packed_key(trial.node, name, trial.kernel)
    for other, kernel in others.items():
        shares = kernel is not trial.kernel and trial.weights and packed_key(trial.node, other, kernel) == key
        if shares and not same(kernel.prepare(trial.weights, trial.device), trial.packed):
            trial.failures.append(f"declarations: {other} packs other bytes under the name {kernel.packed}")
