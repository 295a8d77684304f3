"""acme: eight ops in plain torch, two ops and a weight format of its own. Ids and conversions are left to others."""

from kernelmux.contract import hookimpl

CONTRACT = 2


@hookimpl
def new_formats():
    from kernelmux_acme.formats import TERNARY

    return [TERNARY]


@hookimpl
def new_ops():
    from kernelmux_acme.ops import MulMatSoftcap, Softcap

    return [Softcap(), MulMatSoftcap()]


@hookimpl
def kernel_classes():
    # Here and not above: whoever only lists backends should not wait for torch.
    from kernelmux_acme import kernels as k

    products = [k.Ternary, k.MulMat, k.MulMatSoftcap]
    return [*products, k.RmsNorm, k.Add, k.Mul, k.Silu, k.Softcap, k.Rope, k.Copy, k.Attention]
