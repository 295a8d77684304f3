"""How much the tensor cores' own sums of FP8 products lose, by an emulation that a card's results hold to."""

from __future__ import annotations

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.contract.fast_sums import MOST, too_long
from kernelmux.graph.formats import Value

AT_A_TIME, KEPT = 32, 13
LARGEST = 448.0


def summed(products: torch.Tensor) -> torch.Tensor:
    """Sums along the last axis: so many products at a time and the sum before them, cut to bits below the largest."""
    total = torch.zeros(products.shape[:-1], dtype=torch.float64)
    for several in products.split(AT_A_TIME, dim=-1):
        added = torch.cat([total[..., None], several], dim=-1)
        largest = added.abs().amax(dim=-1, keepdim=True)
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1 - KEPT)
        total = ((added / unit).trunc() * unit).sum(dim=-1)
    return total


def lost(products: torch.Tensor) -> float:
    """NMSE."""
    right = products.sum(dim=-1)
    return float((summed(products) - right).square().sum() / right.square().sum())


def of_one_size(k: int) -> torch.Tensor:
    """The largest activation times each weight that e4m3 has, k times."""
    levels = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    return LARGEST * levels[(levels >= 1) & levels.isfinite()][:, None].expand(-1, k)


@pytest.mark.parametrize(("k", "least", "most"), [(MOST, 1e-4, 5e-3), (2 * MOST, 7e-3, 3e-2), (28_672, 0.3, 0.7)])
def test_of_products_of_one_size_little_is_lost_up_to_the_limit_and_more_than_the_bound_beyond(k, least, most):
    worst = max(lost(one[None]) for one in of_one_size(k))
    assert least < worst < most


def test_of_products_of_both_signs_next_to_nothing_is_lost_up_to_the_limit():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, MOST, generator=generator).to(torch.float8_e4m3fn).double() for _ in range(2))
    assert lost(x * w) < 1e-4


def test_longer_sums_are_declined():
    def answer(k: int) -> object:
        return too_long(one_node("mul_mat", Value("x", (4, k)), weight=(Value("w", (16, k)),)))

    assert answer(MOST) is None
    declined = answer(MOST + 16)
    assert declined.kind == "shape"
    assert f"more than {MOST} products" in declined.reason
    assert f"k is {MOST + 16}" in declined.reason
