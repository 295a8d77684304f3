"""The program around: what it has set for torch holds for itself and not for a session, and it may have forked.

Enters: functions of a session's. Leaves: the same, within which torch is as a process begins with it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from kernelmux.contract.device import PLATFORMS
from kernelmux.errors import KernelmuxError

if TYPE_CHECKING:
    from kernelmux.contract.device import Device

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within the block no default device or dtype, autocast or inference mode of the caller's holds."""
    import torch

    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        for kind in {platform.torch_name(0).partition(":")[0] for platform in PLATFORMS.values()}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            # What is made within is written to when the mode may be over, which torch forbids.
            stack.enter_context(torch.inference_mode(False))
        yield


def plainly(function: Callable[P, T]) -> Callable[P, T]:
    """A function within `plain_torch`; a generator function is while it runs, and not while its caller does."""
    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def steps(*args: P.args, **options: P.kwargs) -> Any:
            generator = function(*args, **options)
            try:
                while True:
                    with plain_torch():
                        try:
                            value = next(generator)
                        except StopIteration:
                            return
                    yield value
            finally:
                generator.close()

        return cast(Callable[P, T], steps)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        with plain_torch():
            return function(*args, **options)

    return call


class _Process:
    """Whether this process has had a session, and is a fork of one that had."""

    ran = False
    forked = False


def _after_fork() -> None:
    _Process.forked = _Process.forked or _Process.ran


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_process(device: Device) -> None:
    """KernelmuxError in a process that was forked after a session ran, where torch would wait for threads for ever."""
    _Process.ran = True
    if not _Process.forked:
        return
    import torch

    if device.platform.host_memory:
        # A fork has none of the threads that its parent has started, and torch does not know.
        if torch.get_num_threads() == 1:
            return
        instead = "call torch.set_num_threads(1) first, or start it by multiprocessing's `spawn`"
    else:
        instead = f"{device.kind} cannot be used in it: start it by multiprocessing's `spawn`"
    raise KernelmuxError(f"this process was forked from one in which a model has run: {instead}")
