"""copy: new keys and values into the paged cache, padding rows left out."""

from __future__ import annotations

from kernelmux.contract import Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_torch.kernel import FLOATS, TorchKernel


class Copy(TorchKernel):
    ops = ("copy",)
    name = "f32"
    precision = 1e-11
    devices: tuple[str, ...] = ("cpu",)
    takes = {"cache_format": FLOATS}
    input_formats = FLOATS

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        k, v, slots, *caches = tensors.inputs
        k_rows, v_rows = (cache.view(-1, rows.shape[1]) for cache, rows in zip(caches, (k, v), strict=True))

        def launch_one() -> None:
            slot = int(slots[0])
            if slot >= 0:
                k_rows[slot].copy_(k[0])
                v_rows[slot].copy_(v[0])

        def launch() -> None:
            kept = (slots >= 0).nonzero().squeeze(1)
            where = slots[kept].long()
            k_rows[where] = k[kept].to(k_rows.dtype)
            v_rows[where] = v[kept].to(v_rows.dtype)

        return launch_one if len(slots) == 1 else launch
