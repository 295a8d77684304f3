"""What torch is told while cuBLAS multiplies, as far as a machine without a card shows it."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernelmux.conformance.testing import one_node
from kernelmux.contract import Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value, Weight
from kernelmux_torch.cuda.experts import MulMatIdBf16
from kernelmux_torch.cuda.mul_mat import F16, Bf16, Bf16Add
from kernelmux_torch.cuda.split_sums import SETTINGS, added_in_float32

CPU = Device("cpu")


def settings() -> list[tuple[bool, bool]]:
    told = torch.backends.cuda.matmul
    return [(getattr(told, name), getattr(told, f"{name}_split_k")) for name in SETTINGS.values()]


@pytest.fixture(autouse=True, params=[(True, True), (False, True), (False, False)], ids=str)
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """What the process was told."""
    names, found = SETTINGS.values(), settings()
    for name in names:
        setattr(torch.backends.cuda.matmul, name, request.param)
    yield request.param
    for name, setting in zip(names, found, strict=True):
        setattr(torch.backends.cuda.matmul, name, setting)


class Seen(TorchDispatchMode):
    """Whether parts may be added in either format, at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):
            self.products.append([allowed for allowed, _ in settings()])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [Bf16(), F16(), Bf16Add(), MulMatIdBf16()], ids=lambda kernel: type(kernel).__name__)
def test_products_of_half_precision_are_made_so_and_the_setting_is_put_back(kernel, before):
    format, (m, n, k) = kernel.input_formats[0], (2, 32, 16)
    op = kernel.ops[0]
    x, y = (torch.ones(m, columns, dtype=kernel.dtype) for columns in (k, n))
    weight = Weight("w", (n, k), format, (torch.ones(n, k, dtype=kernel.dtype),))
    beside = {"mul_mat_add": (Value("r", (m, n), format),), "mul_mat_id": (Value("ids", (m, 1), "i32"),)}.get(op, ())
    fields = {"experts": 1} if op == "mul_mat_id" else {}
    node = one_node(op, Value("x", (m, k), format), *beside, weight=(Value("w", (n, k), format),), **fields)
    inputs = {"mul_mat_add": (x, torch.ones_like(y)), "mul_mat_id": (x, torch.zeros(m, 1, dtype=torch.int32))}
    launch = kernel.call(node, Tensors(inputs.get(op, (x,)), (y,), kernel.prepare([weight], CPU)))
    with Seen() as seen:
        launch()
    allowed = [before[0] and dtype != kernel.dtype for dtype in SETTINGS]
    assert seen.products
    assert all(product == allowed for product in seen.products)
    assert settings() == [before] * 2
    assert y.eq(k + (op == "mul_mat_add")).all()


def test_a_launch_that_raises_leaves_it_as_it_was(before):
    def raises() -> None:
        raise ValueError("a launch")

    with pytest.raises(ValueError, match="a launch"):
        added_in_float32(raises, torch.bfloat16)()
    assert settings() == [before] * 2


def test_threads_launch_one_at_a_time_and_leave_it_as_it_was(before):
    begun, go_on = Event(), Event()

    def waits() -> None:
        begun.set()
        assert go_on.wait(60)

    first = Thread(target=added_in_float32(waits, torch.bfloat16))
    first.start()
    assert begun.wait(60)
    second = Thread(target=added_in_float32(lambda: None, torch.bfloat16))
    second.start()
    go_on.set()
    first.join(60)
    second.join(60)
    assert settings() == [before] * 2
