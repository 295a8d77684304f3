"""Every plain op's CUDA C compiles without a GPU, for every generation of cards that NVRTC knows."""

import pytest

pytest.importorskip("cupy")

from cuda_compiled import FUNCTIONS, known, used


@pytest.mark.slow
@pytest.mark.parametrize("capability", known(), ids=lambda capability: "sm_{}{}".format(*capability))
@pytest.mark.parametrize("label", FUNCTIONS)
def test_it_compiles_and_spills_nothing_on_an_h100(label, capability, record_property):
    file, defines = FUNCTIONS[label]
    functions = used(file, capability, **defines)
    record_property("used", functions)
    assert functions
    if capability == (9, 0):
        assert not [one for one in functions if one.spilled]
