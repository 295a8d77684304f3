"""route, mul_mat_id and expert_sum on CUDA, where nothing else has them: a launch waits for the ids."""

from __future__ import annotations

from kernelmux_torch import experts


class Route(experts.Route):
    devices = ("cuda",)
    # torch's sort allocates.
    capturable = False
    on_card = 12


class MulMatId(experts.MulMatId):
    """The ids are read on the host, then each expert's matrix is made and multiplied by itself."""

    devices = ("cuda",)
    capturable = False
    on_card = 64


class MulMatIdBf16(MulMatId, experts.MulMatIdBf16):
    pass


class ExpertSum(experts.ExpertSum):
    devices = ("cuda",)
