"""The backend's kernels for a card that need not be there."""

import kernelmux_triton
from kernelmux.contract import Declined
from kernelmux.contract.answers import dispatch
from kernelmux.contract.device import Device

H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", (9, 0))


def offers(node, device=H100):
    """What the hook of the node's op answers."""
    return dispatch("triton", kernelmux_triton.kernel_classes(), node, device)


def offered_on(device=H100):
    """The hook of any op, as it answers for a device: for a backend of a test's own."""

    def hook(node, m):
        return offers(node, device)

    return hook


def kernel_of(node, device=H100):
    """The one that comes first for a node."""
    return next(answer for answer in offers(node, device) if not isinstance(answer, Declined))
