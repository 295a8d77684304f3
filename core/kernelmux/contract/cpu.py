"""The processor as a kind of device: which class of processors it is of, and what a thread of one reaches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kernelmux.contract.device import Ceilings, Device, Platform, add_platform
from kernelmux.errors import PlanError

CLASSES = {"avx2": ("avx2",), "avx512": ("avx512",), "avx512_bf16": ("bf16",), "amx": ("amx",)}
"""The feature that each class of x86 processors has beside those of the classes before it."""
RATES = {
    "": {"f32": 38, "bf16": 8},
    "avx2": {"f32": 100, "bf16": 16},
    "avx512": {"f32": 165, "bf16": 34},
    "avx512_bf16": {"f32": 165, "bf16": 100},
    "amx": {"f32": 165, "bf16": 1000},
}
"""GFLOP/s a thread of torch's products of matrices of 1024 and 2048: measured of one thread of a Xeon with AMX (torch
2.13.0, MKL, oneDNN) whose libraries were told to use no more than the class has (`ATEN_CPU_CAPABILITY`,
`ONEDNN_MAX_CPU_ISA`, `MKL_ENABLE_INSTRUCTIONS`), so that they are of one clock. Where bfloat16 has no unit it is
emulated. A processor of no class counts as one without AVX2."""
READ = 12e9
"""Bytes a second that one thread reads: 11.7 to 13.3 GB/s on that Xeon, whatever the class. Many threads share few
channels of memory and read less each, which is left out: all processors of a class get the same plan."""
LAUNCH = 20e-6
"""Seconds of a node of one row that computes next to nothing, in a step, and"""
GAP = 18e-6
"""how many of them are missing where it is called over and over: in a step the code of other nodes has driven its own
from the cache, and its threads must be woken. Whole steps of SmolLM2 took 20 us a node longer than its kernels by
themselves at 1 row, 45 at 8, on that Xeon with two threads."""
CHAINED = 2e-6
"""Seconds of a node among others in one compiled call: its threads are awake, and wait for each other's last part."""
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Limits of oneDNN (ONEDNN_MAX_CPU_ISA in its documentation) under which bfloat16 products are emulated."""
WITHOUT_AMX = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512")
"""Those under which only AMX is missing."""


class Cpu(Platform):
    """The processor that torch runs on, in as many threads as torch uses: these tell no class of processors apart."""

    arch = "|".join(CLASSES)
    example = "cpu avx2"
    counted = False

    def usual(self, device: Device) -> Mapping[str, Any]:
        known = tuple(CLASSES)
        has = known[: known.index(device.arch) + 1] if device.arch in known else ()
        return {"features": frozenset(feature for name in has for feature in CLASSES[name])}

    def find(self, index: int) -> Device:
        if index:
            raise PlanError(f"there is no device cpu:{index}: the processor is one device, cpu")
        import torch

        return Device(self.kind, arch=_class_here(), memory=_memory_here(), processors=torch.get_num_threads())

    def ceilings(self, device: Device) -> Ceilings:
        threads = device.processors or 1
        rates = RATES[device.arch if device.arch in RATES else ""]
        gemm = {format: rate * 1e9 * threads for format, rate in rates.items()}
        # In proportion to the rest, so that how many threads there are moves no choice: a class is tested as a whole.
        launch, gap = 2 * LAUNCH / threads, 2 * GAP / threads
        return Ceilings(copy=READ * threads, read=READ * threads, gemm=gemm, launch=launch, gap=gap, chained=CHAINED)


def _class_here() -> str:
    """The class that torch's kernels and oneDNN's take this processor for; "" for one of none."""
    import torch

    # Both variables make torch's kernels, or oneDNN's, those for an older processor.
    capability = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if capability != "AVX512":
        return "avx2" if capability == "AVX2" else ""
    if limit in WITHOUT_BF16:
        return "avx512"
    if torch.cpu._is_amx_tile_supported() and limit not in WITHOUT_AMX:
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "avx512"


def _memory_here() -> int:
    """Bytes of the machine's memory; 0 where its system does not say."""
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not all(name in getattr(os, "sysconf_names", {}) for name in names):
        return 0
    pages, size = map(os.sysconf, names)
    return max(pages * size, 0)


add_platform(Cpu())
