"""Every installed kernel on every case of its op: within its own bound of float64, or refused with a reason."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from fake_backend import CPU
from kernelmux import registry
from kernelmux.conformance import run_case
from kernelmux.conformance.draw import draw_case
from kernelmux.formats import Value, lookup
from kernelmux.ops import OPS, Case, Rotation

CASES = [case for op in OPS.values() for case in op.cases()]


@cache
def ask(case):
    """The node of a case, and what the backends answer for it."""
    (node,) = draw_case(case).graph.ops
    return node, registry.current().ask(node.op, {"node": node, "device": CPU, **node.contract.arguments(node)})


def _kernels():
    """By op: every kernel that some backend offers, or declines by name, for one of its cases."""
    names = {op: {} for op in OPS}
    for case in CASES:
        _, offer = ask(case)
        names[case.op] |= dict.fromkeys(name for name in (*offer.kernels, *offer.declined) if ":" in name)
    return names


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The cases are small: on a busy machine threads only wait for each other, and take five times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KERNELS = _kernels()
RUNS = [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in KERNELS[case.op]]
EACH = [pytest.param(op, name, id=f"{op}-{name}") for op, names in KERNELS.items() for name in names]


def agrees(case, kernel, bound=None):
    result = run_case(case, kernel, registry.current())
    if result.status == "refused":
        assert result.reason
        return False
    assert result.passed, f"{kernel} on {case.name}: {result.failures}"
    assert bound is None or result.error <= bound
    return True


@pytest.mark.parametrize(("case", "kernel"), RUNS)
def test_a_kernel_agrees_with_float64_or_says_why_it_declines(case, kernel):
    agrees(case, kernel)


@pytest.mark.parametrize(("op", "kernel"), EACH)
def test_a_kernel_takes_at_least_one_case(op, kernel):
    assert any(kernel in ask(case)[1].kernels for case in CASES if case.op == op)


def test_every_case_is_taken_by_some_kernel():
    assert [case.name for case in CASES if not ask(case)[1].kernels] == []


def test_no_backend_was_quarantined():
    assert {name: backend.fault for name, backend in registry.current().backends.items() if backend.fault} == {}


# Formats: each that a kernel declares, and graphs that state another than float32.


def _small(op):
    """A small case of an op, in float32."""
    weight = {
        "rms_norm": {"gamma": (Value("gamma", (64,)),), "epsilon": 1e-5},
        "mul_mat": {"weight": (Value("weight", (16, 64), "Q4_0"),)},
        "embed": {"weight": (Value("weight", (30, 64), "Q8_0"),)},
    }
    inputs = tuple(Value(port, (5, 64)) for port in OPS[op].inputs)
    draw = {}
    if op == "embed":
        inputs = (Value("ids", (5,), "i32"),)
        draw = {"ids": lambda generator: torch.randint(30, (5,), generator=generator, dtype=torch.int32)}
    return Case(f"{op}-small", op, inputs, weight.get(op, {}), draw)


def _stored(case, inputs, output):
    """The case with its inputs and its output stored so."""
    values = tuple(replace(value, format=format) for value, format in zip(case.inputs, inputs, strict=True))
    name = f"{case.name}-{'-'.join(inputs)}-to-{output}"
    return replace(case, name=name, inputs=values, format=output)


def _declared():
    """Every mix of formats that torch's kernels of these ops declare."""
    for op in ("add", "mul", "silu", "rms_norm", "mul_mat", "embed"):
        node, offer = ask(_small(op))
        for name, kernel in offer.kernels.items():
            if name.startswith("torch:"):
                for inputs, outputs in product(product(*kernel.inputs(node)), kernel.outputs(node)[0]):
                    case = _stored(_small(op), inputs, outputs)
                    yield pytest.param(case, name, kernel.precision, id=f"{case.name}-{name}")


@pytest.mark.parametrize(("case", "name", "precision"), list(_declared()))
def test_a_kernel_keeps_its_bound_in_every_format_that_it_declares(case, name, precision):
    """Nothing is converted here: an error above the kernel's own is the rounding of its output, and no other."""
    assert agrees(case, name, bound=precision + lookup(case.format).rounding)


FIRST = {op: next(case for case in CASES if case.op == op) for op in OPS}


@pytest.mark.parametrize("format", ["bf16", "f16"])
@pytest.mark.parametrize(("op", "kernel"), EACH)
def test_a_graph_may_state_another_format_than_float32(op, kernel, format):
    case = FIRST[op]
    inputs = [format if value.format == "f32" else value.format for value in case.inputs]
    # A convert's own formats must differ.
    agrees(_stored(case, inputs, "f32" if op == "convert" else format), kernel)


@pytest.mark.parametrize("kernel", KERNELS["rope"])
@pytest.mark.parametrize(("m", "dims"), [(1, 2), (1, 6), (3, 6), (2, 6)])
@pytest.mark.parametrize("pairing", ["adjacent", "halves"])
def test_rope_turns_an_odd_number_of_pairs(kernel, m, dims, pairing):
    inputs = (Value("q", (m, 16)), Value("k", (m, 8)), Value("positions", (m,), "i32"))
    fields = {"rotation": Rotation(theta=1e4, dims=dims, pairing=pairing), "num_heads": 2, "num_kv_heads": 1}
    draw = {"positions": lambda generator: torch.arange(7, 7 + m, dtype=torch.int32)}
    assert agrees(Case(f"rope-odd-{m}-{dims}-{pairing}", "rope", inputs, {**fields, "head_dim": 8}, draw), kernel)


def _one_a_format(op, kernel):
    """Of the cases that a kernel takes, the smallest of each weight format."""
    taken = [case for case in CASES if case.op == op and kernel in ask(case)[1].kernels and ask(case)[0].weights]
    taken.sort(key=lambda case: -case.inputs[0].nbytes)
    return {ask(case)[0].weights[0].format: case for case in taken}.values()


@pytest.mark.parametrize(("op", "kernel"), EACH)
def test_a_kernel_states_the_bytes_that_it_packs(op, kernel):
    for case in _one_a_format(op, kernel):
        (node, offer), weights = ask(case), draw_case(case).weights
        stored = {plane.data_ptr() for weight in weights.values() for plane in weight.planes}
        made = offer.kernels[kernel].prepare([weights[value.name] for value in node.weights], CPU)
        # What is only the file's own memory costs nothing.
        allocated = sum(part.nbytes for part in made if part.data_ptr() not in stored)
        assert allocated <= offer.kernels[kernel].packed_bytes(node), case.name
