"""Attention as its contract defines it, in steps."""

from __future__ import annotations

import torch

from wrong.kernel import Right


class Paged(Right):
    """The definition, step by step, in float32."""

    dtype = torch.float32
    precision = 1e-9

    def answer(self, node, operands):
        q, k_cache, v_cache, query_start, kv_len, block_table = operands.inputs
        y, self.sinks = torch.zeros_like(q), self.taken(operands.weight)
        starts, lengths = query_start.tolist(), self.lengths(kv_len.tolist())
        for seq, length in enumerate(lengths):
            rows = slice(starts[seq], starts[seq + 1])
            if rows.start == rows.stop or self.skips(length):
                continue
            pages = self.pages(block_table, seq, length, self.page_size(k_cache))
            keys, values = (self.cached(node, cache, pages, length) for cache in (k_cache, v_cache))
            y[rows] = self.mixed(node, q[rows], keys, values, length)
        return (self.rest(y, starts[-1]),)

    def lengths(self, lengths):
        return lengths

    def skips(self, length):
        return length == 0

    def page_size(self, cache):
        return cache.shape[1]

    def pages(self, table, seq, length, page_size):
        return table[seq, : -(-length // page_size)].long()

    def cached(self, node, cache, pages, length):
        """[length, heads, dim]"""
        rows = self.gathered(cache, pages).view(-1, node.num_kv_heads, node.head_dim)[: self.seen(length)]
        return rows[:, self.kv_heads(node)]

    def gathered(self, cache, pages):
        return cache[pages]

    def seen(self, length):
        return length

    def kv_heads(self, node):
        return torch.arange(node.num_heads) // (node.num_heads // node.num_kv_heads)

    def mixed(self, node, q, keys, values, length):
        heads = q.view(len(q), node.num_heads, -1)
        scores = self.capped(torch.einsum("qhd,khd->hqk", heads, keys) * self.scale(node), node)
        last = self.last(torch.arange(len(q)), len(q), length).unsqueeze(1)
        slots = torch.arange(len(keys))
        mask = (
            (slots <= last) & (slots > last - (self.window(node) or len(keys) + 1)) & (slots >= self.chunk(node, last))
        )
        beside = [sink.view(-1, 1, 1).expand(-1, len(q), 1) for sink in self.sinks]
        shares = self.shares(torch.cat([scores.masked_fill(~mask, -torch.inf), *beside], dim=-1))[..., : len(keys)]
        return torch.einsum("hqk,khd->qhd", shares, values).flatten(1)

    def taken(self, sinks):
        return sinks

    def scale(self, node):
        return node.scale

    def capped(self, scores, node):
        return node.soft_cap * torch.tanh(scores / node.soft_cap) if node.soft_cap else scores

    def last(self, row, rows, length):
        """The last position that a row sees."""
        return length - rows + row

    def window(self, node):
        return node.window

    def chunk(self, node, last):
        """Where the chunks of positions begin."""
        return last // node.chunk * node.chunk if node.chunk else 0 * last

    def shares(self, scores):
        return scores.softmax(dim=-1)

    def rest(self, y, used):
        """The rows of no sequence."""
        return y
