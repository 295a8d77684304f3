"""What differs only under CUDA graph capture: these need a CUDA device."""

from __future__ import annotations

import torch

from wrong.kernel import Right, planted


class Capturable(Right):
    """Two launches and no look at the host."""

    launches = 2

    def launch(self, node, tensors):
        (a, b), (y,) = tensors.inputs, tensors.outputs
        torch.add(a, b, out=y)


@planted("add", "captured", device="cuda")
class TakesAnotherPathWhenCaptured(Capturable):
    """Within its bound both ways."""

    precision = 1e-4

    def launch(self, node, tensors):
        super().launch(node, tensors)
        if torch.cuda.is_current_stream_capturing():
            tensors.outputs[0].copy_(tensors.outputs[0].bfloat16())


@planted("add", "declarations", device="cuda")
class LaunchesMoreThanItSays(Capturable):
    def launch(self, node, tensors):
        super().launch(node, tensors)
        tensors.outputs[0].mul_(2)
        tensors.outputs[0].mul_(0.5)


@planted("add", "captured", device="cuda")
class WritesHalfWhenCaptured(Capturable):
    def launch(self, node, tensors):
        (a, b), (y,) = tensors.inputs, tensors.outputs
        half = (len(y) + 1) // 2 if torch.cuda.is_current_stream_capturing() else len(y)
        torch.add(a[:half], b[:half], out=y[:half])


@planted("add", "captured", device="cuda")
class ReadsTheHostAndDoesNotSaySo(Capturable):
    def launch(self, node, tensors):
        if float(tensors.inputs[0].view(-1)[0]) == torch.inf:
            return
        super().launch(node, tensors)
