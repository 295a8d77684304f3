"""CUDA C of this package on the host's CPU: compiled by g++ with `cuda_on_host.h`, launched on CPU tensors."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import mkdtemp

from kernelmux_cupy.launch import _as_bytes
from kernelmux_cupy.source import FOLDER

HERE = Path(__file__).parent
COMPILER = which("g++")
PTX = {
    'asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits))': "y = half_to_float(x.bits)",
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x))': "bits = float_to_half(x)",
}
"""What is PTX in the sources, in C++."""


def function(file, name, device, **defines):
    """As `load.function`: a kernel by its file, name and macros."""
    return _built(file, name, tuple(sorted(defines.items())))


def bind(function, grid, block, args, stream, shared=0):
    """As `launch.bind`: a call of no arguments."""
    values = [_as_bytes(arg) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    extents = (ctypes.c_int * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
    kept = args, values

    def launch():
        assert kept
        function(extents, pointers)

    return launch


OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-w", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
HEADER = "cuda_on_host.h"


@cache
def _folder():
    """The sources as g++ takes them, and their header compiled once: reading it takes longer than most of them."""
    folder = Path(mkdtemp(prefix="kernelmux-host-"))
    for path in FOLDER.glob("*.cu*"):
        text = path.read_text("utf-8")
        for ptx, plain in PTX.items():
            text = text.replace(ptx, plain)
        (folder / path.name).write_text(text)
    (folder / HEADER).write_bytes((HERE / HEADER).read_bytes())
    _compile(["-x", "c++-header", folder / HEADER, "-o", folder / f"{HEADER}.gch"])
    return folder


def _compile(arguments, source=None):
    subprocess.run([COMPILER, *OPTIONS, *arguments], input=source, text=True, check=True)


@cache
def _built(file, name, defines):
    folder = _folder()
    library = folder / f"{file}-{name}-{'-'.join(f'{key}{value}' for key, value in defines)}.so"
    macros = "".join(f"#define {key} {value}\n" for key, value in defines)
    source = f'#include "{HEADER}"\n{macros}#include "{file}.cu"\nLAUNCH({name})\n'
    _compile(["-shared", f"-I{folder}", "-x", "c++", "-", "-o", library], source)
    return ctypes.CDLL(str(library)).launch
