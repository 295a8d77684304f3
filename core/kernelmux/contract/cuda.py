"""CUDA and ROCm as kinds of device: torch calls both `cuda`, and this is the one file of core that speaks to it."""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from kernelmux.contract.device import Ceilings, Device, Platform, add_platform
from kernelmux.errors import PlanError

SHARED_MEMORY = {(7, 0): 96, (7, 2): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227}
SHARED_MEMORY |= {(10, 0): 227, (10, 3): 227, (11, 0): 227, (12, 0): 99, (12, 1): 99}
"""KiB that a block may ask for, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
RATES = {
    "H200": (4.4, {"f32": 50, "bf16": 800, "fp8": 1450}),
    "H100": (3.1, {"f32": 50, "bf16": 720, "fp8": 1300}),
    "GH200": (3.7, {"f32": 50, "bf16": 720, "fp8": 1300}),
    "B200": (7.0, {"f32": 70, "bf16": 1600, "fp8": 3200}),
    "A100": (1.8, {"f32": 19, "bf16": 260}),
    "L40S": (0.78, {"f32": 80, "bf16": 270, "fp8": 540}),
    "L4": (0.27, {"f32": 25, "bf16": 90, "fp8": 180}),
    "4090": (0.93, {"f32": 75, "bf16": 150, "fp8": 300}),
    "3090": (0.87, {"f32": 30, "bf16": 65}),
}
"""TB/s of reading and TFLOP/s of large products that are reached: measured of H100 and H200, else nine tenths of what
the maker states. A card that is not here counts as the first of its architecture, or as an A100."""
MEMORY = {"H200": 140, "H100": 79, "GH200": 94, "B200": 178, "A100": 39, "L40S": 44, "L4": 22, "4090": 23, "3090": 23}
"""GiB that the driver leaves of a card's memory: that of a described card whose name does not say (`A100-80GB`)."""
GAP = 0.5e-6
"""Seconds a launch by which captured decode steps took longer than their kernels' times, on an H200: 0.55, 0.48 and
0.47 us (8B Q4_K_M, 8B bf16, 1B bf16: 325, 454 and 197 launches; docs/results/h200-auto.json)."""
ALIKE = {(9, 0): "H100", (10, 0): "B200", (8, 0): "A100", (8, 6): "3090", (8, 9): "4090", (12, 0): "4090"}
LAUNCHES = (0, 1, 2)
"""The graph nodes that are device launches, by CUDA's number for the type (CUgraphNodeType): kernel, memcpy, memset."""


class Cuda(Platform):
    """NVIDIA's cards."""

    kind = "cuda"
    arch = r"sm_\d{2,3}"
    example = "cuda sm_90 NVIDIA H200"
    host_memory = False
    captures = True
    activations = "bf16"
    method = "CUDA graphs replayed, operands rotated past the L2 cache; microseconds a launch, medians of 40 replays"
    copied_bytes = 2**31
    matrix_size = 8192
    past_cache = 100 * 2**20
    # The runtime's and cuBLAS' words.
    full = ("out of memory", "_ALLOC_FAILED")
    # Faults that end the context, in the CUDA runtime's error strings.
    lost = (
        "illegal memory access",
        "misaligned address",
        "illegal instruction",
        "invalid program counter",
        "device-side assert",
        "unspecified launch failure",
        "hardware stack error",
        "uncorrectable ECC error",
    )

    def torch_name(self, index: int) -> str:
        return f"cuda:{index}"

    def usual(self, device: Device) -> Mapping[str, Any]:
        """Multiprocessors are an H100's, an H200's: a card that is not there is most often one of those."""
        capability = device.capability
        if capability is None and (digits := re.fullmatch(r"sm_(\d+)(\d)", device.arch)):
            capability = int(digits[1]), int(digits[2])
        arch = "sm_{}{}".format(*capability) if capability else ""
        shared = SHARED_MEMORY.get(capability, 0) * 1024 if capability else 0
        said = re.search(r"\b(\d+)GB\b", device.name)
        memory = int(said[1]) * 10**9 if said else MEMORY[_named(device.name) or _alike(capability)] * 2**30
        return {
            "capability": capability,
            "arch": arch,
            "memory": memory,
            "processors": 132,
            "shared_memory": shared,
        }

    def counts_as(self, device: Device) -> str:
        return "" if _named(device.name) else _alike(device.capability)

    def find(self, index: int) -> Device:
        import torch

        with warnings.catch_warnings():
            # torch warns of an old driver here, and says the same in the error below.
            warnings.simplefilter("ignore")
            count = torch.cuda.device_count()
        built = "rocm" if torch.version.hip else "cuda"
        if built != self.kind and (count or built == "rocm"):
            raise PlanError(f"device '{self.kind}:{index}' was asked for, torch is built for {built}: ask for {built}")
        if index >= count:
            raise PlanError(
                f"device '{self.kind}:{index}' was asked for, torch sees {count} {self.kind.upper()} "
                f"devices{_why_none(count)}; cpu works"
            )
        return self._found(index, torch.cuda.get_device_properties(index))

    def _found(self, index: int, properties: Any) -> Device:
        return Device(
            self.kind,
            index,
            properties.name,
            (properties.major, properties.minor),
            memory=properties.total_memory,
            processors=properties.multi_processor_count,
            shared_memory=properties.shared_memory_per_block_optin,
        )

    def gemm_formats(self, device: Device) -> tuple[str, ...]:
        return ("bf16", "fp8") if (device.capability or (0, 0)) >= (8, 9) else ("bf16",)

    def ceilings(self, device: Device) -> Ceilings:
        read, gemm = RATES[_named(device.name) or _alike(device.capability)]
        rates = {format: flops * 1e12 for format, flops in gemm.items()}
        # Four 8-bit products where there would be one of float32.
        rates["dp4a"] = 4 * rates["f32"]
        copy, seconds = read * 0.95e12, {"launch": 1.6e-6, "gap": GAP, "enqueue": 10e-6, "turn": 500e-6}
        return Ceilings(copy, read * 1e12, rates, **seconds)

    def stream(self, device: Device) -> Any:
        return _cuda().Stream(device.torch)

    def current(self, device: Device) -> Any:
        return _cuda().current_stream(device.torch)

    def on(self, stream: Any) -> Any:
        return _cuda().stream(stream)

    def on_stream(self, launch: Callable[[], object], stream: Any) -> Callable[[], object]:
        import torch

        # A tenth of a microsecond; torch's own `current_stream` makes an object, and its context switches twice.
        current, index, wanted = torch._C._cuda_getCurrentRawStream, stream.device_index, stream.cuda_stream

        def launch_there() -> None:
            if current(index) == wanted:
                launch()
            else:
                with torch.cuda.stream(stream):
                    launch()

        return launch_there

    def start(self, index: int) -> None:
        """Makes the context that torch will take: half a second in the driver, outside Python's lock."""
        with suppress(OSError):
            driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
            if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), index):
                driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    def enter_thread(self, device: Device) -> None:
        _cuda().set_device(device.torch)
        # The driver's own calls, as loading a module, need a context: the first call of the runtime makes it current.
        _cuda().mem_get_info(device.torch)

    def settings(self) -> Mapping[str, object]:
        import torch

        told = torch.backends.cuda.matmul
        return {
            "in what torch adds parts of bfloat16 products": told.allow_bf16_reduced_precision_reduction,
            "in what torch adds parts of float16 products": told.allow_fp16_reduced_precision_reduction,
        }

    def synchronize(self, device: Device) -> None:
        _cuda().synchronize(device.torch)

    def range(self, name: str) -> Any:
        return _cuda().nvtx.range(name)

    def keep_busy(self, stream: Any) -> None:
        with _cuda().stream(stream):
            _cuda()._sleep(2**23)

    def graph(self, keep: bool = False) -> Any:
        return _cuda().CUDAGraph(keep_graph=keep)

    def graph_pool(self) -> Any:
        return _cuda().graph_pool_handle()

    @contextmanager
    def capturing(self, graph: Any, stream: Any, pool: Any = None) -> Iterator[None]:
        # torch.cuda.graph does the same, and gives what torch has cached back to the driver each time, which is slow.
        _cuda().synchronize()
        with _cuda().stream(stream or _cuda().Stream()):
            graph.capture_begin(*(() if pool is None else (pool,)), capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()

    def is_capturing(self) -> bool:
        return bool(_cuda().is_current_stream_capturing())

    def count_launches(self, graph: Any) -> int | None:
        return count_launches(graph.raw_cuda_graph(), ctypes.CDLL("libcuda.so.1"))

    def free_bytes(self, device: Device) -> int | None:
        unused = _cuda().memory_reserved(device.torch) - _cuda().memory_allocated(device.torch)
        return int(_cuda().mem_get_info(device.torch)[0] + unused)

    def cache_bytes(self, device: Device) -> int:
        return int(_cuda().get_device_properties(device.torch).L2_cache_size)

    def allocations(self, device: Device) -> int:
        return int(_cuda().memory_stats(device.torch).get("allocation.all.allocated", 0))

    def peak_bytes(self, device: Device) -> int | None:
        return int(_cuda().max_memory_allocated(device.torch))


class Rocm(Cuda):
    """AMD's cards, under a ROCm build of torch: no compute capability, so that CUDA's kernels decline by kind."""

    kind = "rocm"
    arch = r"gfx\w+"
    example = "rocm gfx942 AMD Instinct MI300X"

    def usual(self, device: Device) -> Mapping[str, Any]:
        """Compute units and memory are an MI300X's; a block's memory is that of every CDNA and RDNA card."""
        return {"memory": 191 * 2**30, "processors": 304, "shared_memory": 64 * 1024}

    def _found(self, index: int, properties: Any) -> Device:
        arch = properties.gcnArchName.partition(":")[0]
        memory, processors = properties.total_memory, properties.multi_processor_count
        return Device(self.kind, index, properties.name, arch=arch, memory=memory, processors=processors)

    def count_launches(self, graph: Any) -> int | None:
        return None


def _named(name: str) -> str:
    """The card whose rates are known and which a device's name says; "" for any other."""
    return next((card for card in RATES if card in re.split(r"[ -]", name)), "")


def _alike(capability: tuple[int, int] | None) -> str:
    """The card that one counts as which is not known: the first of its architecture, or an A100."""
    return ALIKE.get(capability or (0, 0), "A100")


def _cuda() -> Any:
    """torch.cuda, imported when a device is first asked for."""
    import torch

    return torch.cuda


def count_launches(graph: int, driver: Any) -> int:
    """How many kernels, copies and fills a CUDA graph holds, by its handle (cudaGraph_t, CUgraph for the driver)."""
    handle, number = ctypes.c_void_p(graph), ctypes.c_size_t()
    _succeed(driver.cuGraphGetNodes(handle, None, ctypes.byref(number)))
    nodes = (ctypes.c_void_p * number.value)()
    if number.value:
        _succeed(driver.cuGraphGetNodes(handle, nodes, ctypes.byref(number)))
    kinds = []
    for node in nodes:
        kind = ctypes.c_int()
        _succeed(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        kinds.append(kind.value)
    return sum(kind in LAUNCHES for kind in kinds)


def _succeed(status: int) -> None:
    """RuntimeError unless a driver call returned CUDA_SUCCESS."""
    if status:
        raise RuntimeError(f"the CUDA driver could not read a captured graph: error {status}")


def _why_none(count: int) -> str:
    """Why torch has no device: built without CUDA, no driver, a driver too old. Empty where it has some."""
    import torch

    if count:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).strip().splitlines()[0].rstrip('.')})"
    return ""


add_platform(Cuda())
add_platform(Rocm())
