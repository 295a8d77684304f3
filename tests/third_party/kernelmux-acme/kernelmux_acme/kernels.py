"""The kernels: float32 in, float32 out."""

from functools import partial

import torch

from kernelmux.contract.hookspecs import Kernel


class _Float32(Kernel):
    name = "f32"
    precision = 1e-9

    def inputs(self, node):
        return [[value.format] if value.format == "i32" else ["f32"] for value in node.inputs]

    def outputs(self, node):
        return [["f32"] for _ in node.outputs]

    def packed_bytes(self, node):
        return sum(4 * torch.Size(value.extents).numel() for value in node.weights)

    def prepare(self, weights, device):
        return tuple(weight.dequantize() for weight in weights)


class MulMat(_Float32):
    packed = "dense"

    def bind(self, node, tensors, stream):
        (x,), (y,) = tensors.inputs, tensors.outputs
        weight, *bias = tensors.packed
        if bias:
            return partial(torch.addmm, bias[0], x, weight.T, out=y)
        return partial(torch.mm, x, weight.T, out=y)


class RmsNorm(_Float32):
    def bind(self, node, tensors, stream):
        (x,), (y,), (gamma,) = tensors.inputs, tensors.outputs, tensors.packed

        def launch():
            scale = (x.square().mean(dim=-1, keepdim=True) + node.epsilon).rsqrt()
            torch.mul(x * scale, gamma, out=y)

        return launch


class Add(_Float32):
    def bind(self, node, tensors, stream):
        return partial(torch.add, *tensors.inputs, out=tensors.outputs[0])


class Mul(_Float32):
    def bind(self, node, tensors, stream):
        return partial(torch.mul, *tensors.inputs, out=tensors.outputs[0])


class Silu(_Float32):
    def bind(self, node, tensors, stream):
        (x,), (y,) = tensors.inputs, tensors.outputs
        return lambda: torch.mul(x, torch.sigmoid(x), out=y)


class Rope(_Float32):
    name = "angles"

    def bind(self, node, tensors, stream):
        q, k, positions = tensors.inputs
        speeds = torch.tensor(node.rotation.frequencies(), dtype=torch.float64)
        dims, magnitude = node.rotation.dims, node.rotation.magnitude
        pairs = (
            torch.arange(dims).view(-1, 2) if node.rotation.pairing == "adjacent" else torch.arange(dims).view(2, -1).T
        )
        left, right = pairs.T

        def launch():
            angles = positions.double()[:, None] * speeds
            cos, sin = ((part * magnitude).float()[:, None] for part in (angles.cos(), angles.sin()))
            for rows, turned in zip((q, k), tensors.outputs, strict=True):
                heads = rows.reshape(len(rows), -1, node.head_dim).clone()
                a, b = heads[..., left], heads[..., right]
                heads[..., left], heads[..., right] = a * cos - b * sin, a * sin + b * cos
                turned.copy_(heads.view(rows.shape))

        return launch


class Copy(_Float32):
    name = "scatter"
    capturable = False

    def bind(self, node, tensors, stream):
        keys, values, slots, *caches = tensors.inputs

        def launch():
            kept = slots >= 0
            for rows, cache in zip((keys, values), caches, strict=True):
                cache.view(-1, rows.shape[1])[slots[kept].long()] = rows[kept]

        return launch


class Attention(_Float32):
    """One sequence after another, one matrix of scores a head."""

    name = "loop"
    capturable = False

    def bind(self, node, tensors, stream):
        q, k_cache, v_cache, query_start, kv_len, block_table = tensors.inputs
        (y,) = tensors.outputs
        group, page_size = node.num_heads // node.num_kv_heads, k_cache.shape[1]

        def one(first, last, length, pages):
            keys, values = (
                cache[pages[: -(-length // page_size)].long()].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
                for cache in (k_cache, v_cache)
            )
            heads = q[first:last].view(last - first, node.num_heads, node.head_dim)
            scores = torch.einsum("qhd,khd->hqk", heads, keys) * node.scale
            own = torch.arange(length - (last - first), length)
            scores.masked_fill_(torch.arange(length) > own[:, None], float("-inf"))
            y[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values).flatten(1)

        def launch():
            y.zero_()
            starts = query_start.tolist()
            for sequence, length in enumerate(kv_len.tolist()):
                first, last = starts[sequence : sequence + 2]
                if length and first < last:
                    one(first, last, length, block_table[sequence])

        return launch
