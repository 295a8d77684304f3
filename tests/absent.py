"""The installed backends but some, as on a machine that lacks them: for what is about the others' kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from kernelmux.contract import registry
from kernelmux.contract.registry import Registry


@contextmanager
def without(*names: str) -> Iterator[Registry]:
    """Within the block this process has found no backends of these names, whether they are installed or not."""
    found = registry.discover()
    for name in {*names} & {*found.backends}:
        found.unregister(name)
    with mock.patch.object(registry, "_current", found):
        yield found
