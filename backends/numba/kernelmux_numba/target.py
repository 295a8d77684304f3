"""The processor that code is compiled for: what its vectors hold, and how it multiplies eight-bit integers.

Enters: a Device, whose class says what may be used (`avx2`: nothing newer, as torch may be told). Leaves: a Target.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from kernelmux.contract import Device

Dot = Literal["fours", "pairs"]
"""What is multiplied and added to 32 bits at once: four bytes (AVX-512 VNNI, AVX-VNNI), or two integers of 16 bits."""
LANES = {"avx2": 8, "avx512": 8, "avx512_bf16": 16, "amx": 16}
"""Numbers of 32 bits in a vector, by class of processors; of all others 4. Not all with AVX-512 multiply bytes in its
vectors, but all with its bfloat16 do."""
GENERIC = {"avx2": "x86-64-v3", "": "x86-64-v2"}
"""What LLVM calls the processors of a class that this one is newer than. One of no class has SSE4.2."""
NEWER = {"avx2": "avx512f", "": "avx2"}
"""What a processor has that is newer than a class."""


@dataclass(frozen=True)
class Target:
    """A processor as LLVM knows it, and what the kernels' code depends on."""

    cpu: str
    features: str
    lanes: int
    """Numbers of 32 bits in a vector."""
    dot: Dot
    x86: bool = True
    triple: str = ""
    """Of another system than this one's."""

    @property
    def limited(self) -> bool:
        """Whether this processor has more than its class."""
        return self.cpu in GENERIC.values()

    @property
    def float16(self) -> bool:
        """Whether it converts float16 itself."""
        return not self.x86 or self.lanes > 4

    def machine(self) -> Any:
        """LLVM's compiler for it."""
        import llvmlite.binding as llvm

        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        triple = self.triple or llvm.get_process_triple()
        return llvm.Target.from_triple(triple).create_target_machine(
            cpu=self.cpu, features=self.features, opt=3, reloc="pic", codemodel="small" if self.triple else "jitdefault"
        )


def lanes_of(device: Device) -> int:
    """Of a class of processors, wherever it is asked."""
    return LANES.get(device.arch, 4)


@cache
def target_of(device: Device) -> Target:
    """This machine's processor, with no more than a device's class has."""
    import llvmlite.binding as llvm

    has, lanes = llvm.get_host_cpu_features(), lanes_of(device)
    if not llvm.get_process_triple().startswith(("x86_64", "i686")):
        return Target(llvm.get_host_cpu_name(), has.flatten(), lanes, "pairs", x86=False)
    if device.arch in NEWER and has.get(NEWER[device.arch]):
        return Target(GENERIC[device.arch], "", lanes, "pairs")
    vnni = has.get("avxvnni") or (has.get("avx512vnni") and has.get("avx512vl"))
    return Target(llvm.get_host_cpu_name(), has.flatten(), lanes, "fours" if vnni and lanes > 4 else "pairs")


@cache
def outdone(target: Target) -> bool:
    """Whether torch's GEMM has wider vectors than a class that this processor is limited to: no class limits MKL, which
    takes AVX-512 on Intel's processors and AVX2 on AMD's."""
    import llvmlite.binding as llvm

    wider = llvm.get_host_cpu_features().get("avx512f") and not llvm.get_host_cpu_name().startswith("znver")
    return target.limited and bool(wider)
