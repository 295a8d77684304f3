"""acme: eight ops in plain torch. Ids and formats are left to other backends."""

from kernelmux.contract.hookspecs import Declined, hookimpl

CONTRACT = 1


@hookimpl
def dispatch_mul_mat(device):
    return _offer("MulMat", device)


@hookimpl
def dispatch_rms_norm(device):
    return _offer("RmsNorm", device)


@hookimpl
def dispatch_add(device):
    return _offer("Add", device)


@hookimpl
def dispatch_rope(node, device):
    if node.weight:
        return Declined("it knows no divisors of frequencies", kernel="angles")
    return _offer("Rope", device)


@hookimpl
def dispatch_attention(node, cache_format, device):
    if node.soft_cap or node.window:
        return Declined("it knows neither windows nor soft caps", kernel="loop")
    if cache_format != "f32":
        return Declined(f"it reads caches in f32, not {cache_format}", "format", "loop")
    return _offer("Attention", device)


@hookimpl
def dispatch_copy(cache_format, device):
    if cache_format != "f32":
        return Declined(f"it writes caches in f32, not {cache_format}", "format", "scatter")
    return _offer("Copy", device)


@hookimpl
def dispatch_mul(device):
    return _offer("Mul", device)


@hookimpl
def dispatch_silu(device):
    return _offer("Silu", device)


def _offer(name, device):
    if device.kind != "cpu":
        return Declined(f"it runs on the CPU, the plan is for {device.kind}", "device")
    # Here and not above: whoever only lists backends should not wait for torch.
    from kernelmux_acme import kernels

    return getattr(kernels, name)()
