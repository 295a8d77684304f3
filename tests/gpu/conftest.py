"""What needs a CUDA device: skipped, with the reason, where there is none; a share of it where one is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="K/N", help="Only each N-th test, from the K-th on.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="no CUDA device: `make gpu-test` runs this on a machine with one")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(missing)
    # Where this folder is not asked for by name, pytest has not seen the option.
    index, count = map(int, config.getoption("--shard", "1/1").split("/"))
    items[:] = items[index - 1 :: count]
