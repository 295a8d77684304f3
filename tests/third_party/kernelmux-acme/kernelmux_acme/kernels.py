"""The kernels: float32 in, float32 out."""

from functools import partial

import torch

from kernelmux.contract import Declined, Kernel
from kernelmux_acme.formats import COLUMNS, signs


class _Float32(Kernel):
    name = "f32"
    precision = 1e-9
    devices = ("cpu",)

    def inputs(self, node):
        return [[value.format] if value.format == "i32" else ["f32"] for value in node.inputs]

    def outputs(self, node):
        return [["f32"] for _ in node.outputs]

    def packed_bytes(self, node):
        return sum(4 * torch.Size(value.extents).numel() for value in node.weights)

    def prepare(self, weights, device):
        return tuple(weight.dequantize() for weight in weights)


class MulMat(_Float32):
    ops = ("mul_mat",)
    packed = "dense"

    def bind(self, node, tensors, stream):
        (x,), (y,) = tensors.inputs, tensors.outputs
        weight, *bias = tensors.packed
        if bias:
            return partial(torch.addmm, bias[0], x, weight.T, out=y)
        return partial(torch.mm, x, weight.T, out=y)


class MulMatSoftcap(MulMat):
    ops = ("mul_mat_softcap",)

    def bind(self, node, tensors, stream):
        product, (y,) = super().bind(node, tensors, stream), tensors.outputs

        def launch():
            product()
            y.div_(node.cap).tanh_().mul_(node.cap)

        return launch


class Ternary(_Float32):
    """A byte a weight, multiplied by the scales into scratch."""

    ops = ("mul_mat",)
    name = packed = "ternary"
    takes = {"weight_format": ("acme_ternary",), "bias": (False,)}

    def packed_bytes(self, node):
        n, k = node.weight[0].extents
        return n * k + 4 * n * (k // COLUMNS)

    def prepare(self, weights, device):
        codes, scales = weights[0].planes
        return signs(codes).unflatten(-1, (-1, COLUMNS)), scales.float().unsqueeze(-1)

    def workspace(self, node):
        n, k = node.weight[0].extents
        return 4 * n * k

    def bind(self, node, tensors, stream):
        (x,), (y,), (trits, scales) = tensors.inputs, tensors.outputs, tensors.packed
        dense = tensors.workspace.view(torch.float32).view(trits.shape)

        def launch():
            torch.mul(trits, scales, out=dense)
            torch.mm(x, dense.flatten(1).T, out=y)

        return launch


class RmsNorm(_Float32):
    ops = ("rms_norm",)

    def bind(self, node, tensors, stream):
        (x,), (y,), (gamma,) = tensors.inputs, tensors.outputs, tensors.packed

        def launch():
            scale = (x.square().mean(dim=-1, keepdim=True) + node.epsilon).rsqrt()
            torch.mul(x * scale, gamma, out=y)

        return launch


class Add(_Float32):
    ops = ("add",)

    def bind(self, node, tensors, stream):
        return partial(torch.add, *tensors.inputs, out=tensors.outputs[0])


class Mul(_Float32):
    ops = ("mul",)

    def bind(self, node, tensors, stream):
        return partial(torch.mul, *tensors.inputs, out=tensors.outputs[0])


class Silu(_Float32):
    ops = ("silu",)

    def bind(self, node, tensors, stream):
        (x,), (y,) = tensors.inputs, tensors.outputs
        return lambda: torch.mul(x, torch.sigmoid(x), out=y)


class Softcap(_Float32):
    ops = ("softcap",)

    def bind(self, node, tensors, stream):
        (x,), (y,) = tensors.inputs, tensors.outputs
        return lambda: torch.mul(torch.tanh(x / node.cap), node.cap, out=y)


class Rope(_Float32):
    ops = ("rope",)
    name = "angles"

    def refuses(self, node):
        return Declined("it knows no divisors of frequencies") if node.weight else None

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
    ops = ("copy",)
    name = "scatter"
    takes = {"cache_format": ("f32",)}
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

    ops = ("attention",)
    name = "loop"
    takes = {"cache_format": ("f32",)}
    capturable = False

    def refuses(self, node):
        known = not (node.soft_cap or node.window or node.chunk or node.weight)
        return None if known else Declined("it knows neither windows nor chunks nor soft caps nor sinks")

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
