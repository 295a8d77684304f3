"""What a backend is: its hooks, its kernels, the devices that they run on, and where they are found.

All that a backend imports to say what it has comes from here.
"""

# Makes its kinds of device known.
from kernelmux.contract import cpu as cpu
from kernelmux.contract import cuda as cuda
from kernelmux.contract.device import Device, on_stream
from kernelmux.contract.hookspecs import CONTRACT, Hooks, hookimpl, hookspec
from kernelmux.contract.kernel import (
    EVERY_OP,
    Answer,
    Chain,
    CurrentStream,
    Declined,
    Efficiency,
    Kernel,
    Launch,
    Planes,
    Tensors,
    in_turn,
)

__all__ = [
    "CONTRACT",
    "EVERY_OP",
    "Answer",
    "Chain",
    "CurrentStream",
    "Declined",
    "Device",
    "Efficiency",
    "Hooks",
    "Kernel",
    "Launch",
    "Planes",
    "Tensors",
    "hookimpl",
    "hookspec",
    "in_turn",
    "on_stream",
]
