"""The tutorial backend: which nodes it takes. `kernelmux plan` asks here, before anything is packed or launched."""

from kernelmux.contract.hookspecs import Declined, hookimpl

CONTRACT = 1  # the version of hookspecs.py that this was written for


# A hook is `dispatch_` and the op's name. It takes only those of its arguments that it uses, by name.
@hookimpl
def dispatch_add(device):
    return _offer("Add", device)


@hookimpl
def dispatch_silu(device):
    return _offer("Silu", device)


@hookimpl
def dispatch_rms_norm(device):
    return _offer("RmsNorm", device)


@hookimpl
def dispatch_mul_mat(node, weight_format, device):
    # A reason is one clause for a person; the word after it says what kind it is, for programs. Both are in every plan.
    if weight_format not in ("Q4_0", "Q4_1"):
        return Declined(f"it takes weights in Q4_0 and Q4_1, not {weight_format}", "format", "int4")
    if node.bias:
        return Declined("it adds no bias", kernel="int4")
    return _offer("MulMat", device)


def _offer(kernel, device):
    if device.kind != "cpu":
        return Declined(f"it runs on the CPU, the plan is for {device.kind}", "device")
    # Imported here and not above: whoever only lists backends should not wait for a framework to load.
    from kernelmux_tutorial import kernels

    return getattr(kernels, kernel)()
