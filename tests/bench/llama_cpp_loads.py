"""Asks llama.cpp to load the files of tests/llama_cpp_files.py, and writes what comes of it to tests/data.

    PYTHONPATH=tests python tests/bench/llama_cpp_loads.py --llama-python PATH

`--llama-python` is an interpreter that has llama-cpp-py-sync. It loads one file after another in a process of its own;
that it ends at one is a verdict, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_cpp_files import VERDICTS, files, headers

LOADER = """
import ctypes, importlib.metadata, os, pathlib, sys
import llama_cpp_py_sync._cffi_bindings as bindings
lib, ffi = bindings.get_lib(), bindings.ffi
lib.llama_backend_init()
asked = lib.llama_model_default_params()
asked.n_gpu_layers = 0
os.dup2(os.open(sys.argv[1], os.O_RDWR | os.O_APPEND), 2)
print(importlib.metadata.version("llama-cpp-py-sync"), flush=True)
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]
ggml = ctypes.CDLL(next(map(str, pathlib.Path(bindings.__file__).parent.glob("libggml-base*"))))
ggml.gguf_init_from_file.restype, ggml.gguf_init_from_file.argtypes = ctypes.c_void_p, [ctypes.c_char_p, Params]
for path in sys.stdin:
    if path.strip().endswith(".header"):
        print("" if ggml.gguf_init_from_file(path.strip().encode(), Params(True, None)) else "refused", flush=True)
        continue
    model = lib.llama_model_load_from_file(path.strip().encode(), asked)
    print("refused" if model == ffi.NULL else "", flush=True)
    if model != ffi.NULL:
        lib.llama_model_free(model)
"""
TOLD = re.compile(r"(?:error loading model: |gguf_init_from_\w+: |GGML_ASSERT)(?!.*failed to load model).*")


class Loader:
    """A process that loads files; another one after each at which it ends."""

    def __init__(self, python: str, log: Path) -> None:
        self._python, self._log = python, log
        self._start()

    def _start(self) -> None:
        self._log.write_text("")
        # A process that ends would have a debugger print its stack.
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        started = [self._python, "-c", LOADER, str(self._log)]
        self._process = subprocess.Popen(
            started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.version = self._process.stdout.readline().strip()  # type: ignore[union-attr]

    def __call__(self, path: Path) -> str:
        """llama.cpp's refusal, empty where it loads the file."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.truncate(self._log, 0)
        print(path, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if answer == "\n":
            return ""
        told = TOLD.findall(self._log.read_text(errors="replace"))
        said = ascii(told[-1].removeprefix("error loading model: ") if told else "refused")[1:-1]
        if not answer:
            self._process.wait()
            self._start()
            said = f"the process ended: {said}"
        return re.sub(r"\s+", " ", said.replace(str(path), "FILE"))[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True, metavar="PATH")
    asked = parser.parse_args()
    verdicts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        load = Loader(asked.llama_python, Path(folder) / "log")
        path = Path(folder) / "file.gguf"
        for name, mutant in files(Path(folder)):
            path.write_bytes(mutant.data)
            verdicts[name] = [mutant.told, load(path)]
            print(name, *verdicts[name], file=sys.stderr)
        for name, data in headers():
            (header := path.with_suffix(".header")).write_bytes(data)
            verdicts[name] = ["", load(header)]
    build = f"b{load.version.rpartition('.')[2]}"
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(verdict)}" for name, verdict in verdicts.items())
    VERDICTS.write_text(f'{{\n"llama.cpp": {json.dumps(build)}, "files": {{\n{lines}\n}}\n}}\n', "utf-8")


if __name__ == "__main__":
    main()
