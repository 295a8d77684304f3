"""Where cuBLAS splits a sum, its parts are added in float32, whatever format the result has.

torch lets it add them in the result's: on an H200 a product of 7 x 2249 and 2249 x 10 with a bias was that bias with
eight products after eight added to it in bfloat16, and 5 % off.
"""

from __future__ import annotations

from threading import Lock

import torch

from kernelmux.contract import Launch

SETTINGS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
_one_at_a_time = Lock()


def added_in_float32(launch: Launch, dtype: torch.dtype) -> Launch:
    """A launch of products with results of that dtype, with torch told so and afterwards what it was told before.

    The setting is the process's: of two threads at a time one would put back what the other has set.
    """
    name, told = SETTINGS[dtype], torch.backends.cuda.matmul

    def launch_so() -> None:
        with _one_at_a_time:
            if not getattr(told, name):
                launch()
                return
            setattr(told, name, False)
            try:
                launch()
            finally:
                setattr(told, name, True)

    return launch_so
