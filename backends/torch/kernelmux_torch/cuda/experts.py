"""route, mul_mat_id and expert_sum on CUDA, where nothing else has them: a launch waits for the ids."""

from __future__ import annotations

from kernelmux.contract import Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_torch import experts
from kernelmux_torch.cuda.split_sums import added_in_float32


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
    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        return added_in_float32(super().call(node, tensors), self.dtype)


class ExpertSum(experts.ExpertSum):
    devices = ("cuda",)
