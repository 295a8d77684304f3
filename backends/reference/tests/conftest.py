"""Of the reference's conformance the drawn cases are slow: it is what the others are held against, case by case."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("drawn") and Path(__file__).parent in item.path.parents:
            item.add_marker("slow")
