"""The kernels, in numpy. Each says what it takes, and binds itself once to memory that it then runs on many times."""

import numpy as np
import torch

from kernelmux.contract import Declined, Kernel


class Float32(Kernel):
    """What all kernels here declare."""

    name = "f32"
    devices = ("cpu",)
    # The bound on the squared error over the squared result, against float64. The suite holds the kernel to it.
    precision = 1e-10

    # Formats that it reads and writes, best first, for each input and output. Where a neighbour has only another one,
    # the plan puts a conversion in between: a kernel need not know of bf16 to stand beside one that wants it.
    def inputs(self, node):
        return [["f32"] for _ in node.inputs]

    def outputs(self, node):
        return [["f32"] for _ in node.outputs]


class Add(Float32):
    ops = ("add",)

    def bind(self, node, tensors, stream):
        # All that is slow happens here, once. `.numpy()` is a view: the memory is the plan's, and its address is fixed.
        a, b, y = (x.numpy() for x in (*tensors.inputs, *tensors.outputs))
        # What is returned is the launch. It has no arguments and looks nothing up; `out=y` writes where the plan says.
        return lambda: np.add(a, b, out=y)


class Silu(Float32):
    ops = ("silu",)

    def bind(self, node, tensors, stream):
        x, y = (x.numpy() for x in (*tensors.inputs, *tensors.outputs))
        # Far below 0 the result is 0 to float32, and exp would be infinite.
        return lambda: np.divide(x, 1 + np.exp(-np.maximum(x, -80)), out=y)


class RmsNorm(Float32):
    ops = ("rms_norm",)
    packed = "f32"  # the name of the packed form: kernels that share it share the copy

    def packed_bytes(self, node):
        return 4 * node.gamma[0].extents[0]

    def prepare(self, weights, device):
        # The model's tensors come as the file holds them, in the order weight, bias, gamma; here it is gamma alone.
        return tuple(weight.dequantize() for weight in weights)

    def bind(self, node, tensors, stream):
        x, y, gamma = (x.numpy() for x in (*tensors.inputs, *tensors.outputs, *tensors.packed))

        def launch():
            scale = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + node.epsilon)
            np.multiply(x * scale, gamma, out=y)

        return launch


class MulMat(Float32):
    """Rows times 4-bit weights. GGUF keeps 32 of them in a block: w = scale * q + minimum, with q from 0 to 15."""

    ops = ("mul_mat",)
    name = "int4"
    packed = "bytes"
    # Of what the op's hook is told (docs/ops.md), what it takes: values, or a range as "..64".
    takes = {"weight_format": ("Q4_0", "Q4_1")}

    def refuses(self, node):
        # What cannot be said that way: a clause for a person, which is in every plan.
        return Declined("it adds no bias") if node.bias else None

    def packed_bytes(self, node):
        # Known before anything is packed, so that `kernelmux plan` can say what a policy costs.
        n, k = node.weight[0].extents
        return n * k + 2 * 4 * n * (k // 32)

    def prepare(self, weights, device):
        """One byte a weight [n, k / 32, 32], and float32 scales and minima [n, k / 32, 1]."""
        (weight,) = weights
        n, k = weight.shape
        blocks = weight.planes[0].numpy().reshape(n, k // 32, -1)
        # A block of Q4_0 is a float16 scale and 16 bytes; Q4_1 has a float16 minimum between them.
        head, nibbles = blocks[:, :, :-16].copy().view(np.float16).astype(np.float32), blocks[:, :, -16:]
        scales = head[:, :, :1].copy()
        minima = head[:, :, 1:].copy() if weight.format == "Q4_1" else -8 * scales
        # The low halves of the 16 bytes are the first 16 weights, the high halves the others.
        quants = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
        return tuple(torch.from_numpy(part) for part in (quants, scales, minima))

    def workspace(self, node):
        # Room for the weight in float32. All nodes of a plan take turns in one such room.
        n, k = node.weight[0].extents
        return 4 * n * k

    def bind(self, node, tensors, stream):
        x, y, quants, scales, minima = (x.numpy() for x in (*tensors.inputs, *tensors.outputs, *tensors.packed))
        dense = tensors.workspace.numpy().view(np.float32).reshape(quants.shape)
        matrix = dense.reshape(node.weight[0].extents)

        def launch():
            np.multiply(quants, scales, out=dense)
            np.add(dense, minima, out=dense)
            np.matmul(x, matrix.T, out=y)

        return launch
