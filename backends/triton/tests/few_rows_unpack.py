"""The inverse of `kernelmux_triton.few_rows_pack`: the blocks [n, bytes] that were packed."""

import torch

from kernelmux.graph.formats import lookup


def unpack(format, planes):
    """The blocks [n, bytes] that were packed."""
    n, fmt = len(planes[0]), lookup(format)
    columns = planes[0].shape[1] * (1 if planes[0].dtype == torch.int8 else 2)
    return (_join_q4_k if format == "Q4_K" else _join_simple)(planes, columns // fmt.block).reshape(n, -1)


def _bytes(items):
    """Items [n, blocks] as bytes [n, blocks, bytes of one item]."""
    return items.contiguous().unsqueeze(-1).view(torch.uint8)


def _join_simple(planes, blocks):
    q, scales = planes
    return torch.cat([_bytes(scales), q.view(torch.uint8).view(len(q), blocks, -1)], dim=-1)


def _join_q4_k(planes, blocks):
    halves, together, pairs = planes
    n = len(halves)
    halves = halves.view(n, blocks, 4, 2, 16)
    q = torch.cat([halves & 15, halves >> 4], dim=-1)
    nibbles = (q[..., 0, :] | q[..., 1, :] << 4).flatten(2)
    scales, minima = together.contiguous().view(torch.uint8).view(n, blocks, 8, 2).unbind(dim=-1)
    first = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    second = minima[..., :4] | (minima[..., 4:] >> 4) << 6
    rest = (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4
    return torch.cat([_bytes(pairs), first, second, rest, nibbles], dim=-1)
