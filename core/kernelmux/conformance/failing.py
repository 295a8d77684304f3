"""A launch that fails midway, as one does where memory runs out: torch raises at one of the calls that it makes.

Enters: a launch. Leaves: whatever it raises; nothing is raised where it calls no function of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

from kernelmux.contract.kernel import Launch


class _Raises(TorchFunctionMode):
    """Counts torch's functions as they are called, and raises in place of one of them."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.count += 1
        if self.count == self.at:
            raise RuntimeError("out of memory, says the conformance suite")
        return func(*args, **(kwargs or {}))


def failing(launch: Launch, last: bool) -> None:
    """Launches with torch raising at the first of its calls, or, after a launch that counts them, at the last."""
    at = 1
    if last:
        with _Raises() as counted:
            launch()
        at = counted.count
    with _Raises(at):
        launch()
