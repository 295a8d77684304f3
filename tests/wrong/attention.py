"""attention: pages, heads, masks, scores."""

from __future__ import annotations

import dataclasses

import torch

from wrong.kernel import planted
from wrong.paged import Paged


@planted("attention", "error")
class ReadsPagesInOrder(Paged):
    """The block table is ignored."""

    def pages(self, table, seq, length, page_size):
        return torch.arange(-(-length // page_size))


@planted("attention", "error", first="*-batch")
class ReadsTheFirstTable(Paged):
    def pages(self, table, seq, length, page_size):
        return super().pages(table, 0, length, page_size)


@planted("attention", "error", first="*-batch")
class ReadsPagesInARow(Paged):
    """From the first page on."""

    def pages(self, table, seq, length, page_size):
        pages = super().pages(table, seq, length, page_size)
        return pages[0] + torch.arange(len(pages))

    def gathered(self, cache, pages):
        return cache[pages % len(cache)]


@planted("attention", "error", first="*-decode-48")
class LeavesOutTheLastPageAtItsEdge(Paged):
    def pages(self, table, seq, length, page_size):
        pages = super().pages(table, seq, length, page_size)
        return pages[:-1] if length % page_size == 0 and length > page_size else pages

    def mixed(self, node, q, keys, values, length):
        return super().mixed(node, q, keys, values, len(keys))


@planted("attention", "error", first="*-decode-49")
class LeavesOutOnePositionPastAnEdge(Paged):
    """Pages rounded down."""

    def seen(self, length):
        return length - (length % 16 == 1 and length > 16)

    def mixed(self, node, q, keys, values, length):
        return super().mixed(node, q, keys, values, len(keys))


@planted("attention", "error", first="*-page-32")
class PagesOf16Only(Paged):
    def page_size(self, cache):
        return 16

    def gathered(self, cache, pages):
        return cache.view(-1, 16, *cache.shape[2:])[pages]


@planted("attention", "error", first="*-page-*")
class PagesOf32AtMost(Paged):
    """Slots beyond the 32nd of a page are taken from the next."""

    def page_size(self, cache):
        return min(cache.shape[1], 32)

    def gathered(self, cache, pages):
        return cache[:, : self.page_size(cache)].contiguous()[pages]

    def mixed(self, node, q, keys, values, length):
        return super().mixed(node, q, keys, values, len(keys))


@planted("attention", "error")
class TakesKvHeadsByRemainder(Paged):
    def kv_heads(self, node):
        return torch.arange(node.num_heads) % node.num_kv_heads


@planted("attention", "error", first="*-prefill-*")
class SeesTheFuture(Paged):
    def last(self, row, rows, length):
        return torch.full_like(row, length - 1)


@planted("attention", "error", first="*-chunk-*")
class CountsRowsFromTheStart(Paged):
    """Row i sees i + 1 positions, also where others were cached before."""

    def last(self, row, rows, length):
        return row if rows > 1 else super().last(row, rows, length)


@planted("attention", "error")
class SeesAllButItself(Paged):
    def last(self, row, rows, length):
        return (super().last(row, rows, length) - 1).clamp(min=0)


@planted("attention", "error", first="*-batch")
class TakesTheLongestLength(Paged):
    def lengths(self, lengths):
        return [max(lengths) if length else 0 for length in lengths]

    def gathered(self, cache, pages):
        return torch.cat([cache[pages], cache, cache, cache])


@planted("attention", "error", first="*-window-*")
class IgnoresTheWindow(Paged):
    def window(self, node):
        return 0


@planted("attention", "error", first="*-window-*")
class WindowOneTooWide(Paged):
    def window(self, node):
        return node.window and node.window + 1


@planted("attention", "error", first="*-window-*")
class WindowOneTooNarrow(Paged):
    def window(self, node):
        return node.window and max(node.window - 1, 1)


@planted("attention", "error", first="*-chunked-*")
class IgnoresTheChunk(Paged):
    def chunk(self, node, last):
        return 0 * last


@planted("attention", "error", first="*-chunked-*")
class TakesTheChunkForAWindow(Paged):
    def chunk(self, node, last):
        return last + 1 - node.chunk if node.chunk else 0 * last


@planted("attention", "error", first="*-chunked-*")
class TakesTheFirstRowsChunk(Paged):
    """Of a block of rows, which may reach into the next one."""

    def chunk(self, node, last):
        return super().chunk(node, last[:1]).expand(last.shape)


@planted("attention", "error", first="*-soft-cap-*")
class CapsWhatIsMasked(Paged):
    """A mask of -inf comes out of tanh as minus the cap."""

    def capped(self, scores, node):
        self.least = -node.soft_cap or -torch.inf
        return super().capped(scores, node)

    def shares(self, scores):
        return super().shares(scores.clamp(min=self.least))


@planted("attention", "error", first="*-sinks-*")
class LeavesOutTheSinks(Paged):
    def taken(self, sinks):
        return ()


@planted("attention", "error", first="*-sinks-*")
class TakesTheFirstHeadsSink(Paged):
    def taken(self, sinks):
        return tuple(sink[:1].expand(len(sink)) for sink in sinks)


@planted("attention", "error", first="*-soft-cap-*")
class CapsBeforeTheScale(Paged):
    def scale(self, node):
        return 1.0 if node.soft_cap else node.scale

    def capped(self, scores, node):
        return super().capped(scores, node) * (node.scale if node.soft_cap else 1.0)


@planted("attention", "finite", first="*-window-long")
class NanForATileOfNothing(Paged):
    """The running maximum of 64 masked positions is -inf, where nothing came before them."""

    def shares(self, scores):
        first = scores[..., :64].amax(dim=-1, keepdim=True)
        return scores.softmax(dim=-1) + (first - first)


@planted("attention", "finite", first="*-outliers")
class ScoresInFloat16(Paged):
    precision = 1e-5

    def capped(self, scores, node):
        return super().capped(scores.half().float(), node)


@planted("attention", "error", first="*-h4-kv2-d80")
class ScalesByThePaddedHead(Paged):
    """Of 80 elements as if it had 128."""

    def scale(self, node):
        padded = node.head_dim if node.head_dim in (64, 96, 128, 256) else 128
        return node.scale * (node.head_dim / padded) ** 0.5


@planted("attention", "error", first="*-soft-cap-*")
class IgnoresTheSoftCap(Paged):
    def capped(self, scores, node):
        return scores


@planted("attention", "error", first="*-window-soft-cap")
class CapsOrWindows(Paged):
    """The two together were never tried."""

    def window(self, node):
        return 0 if node.soft_cap else node.window


@planted("attention", "error", first="*-scale")
class TakesItsOwnScale(Paged):
    """One over the square root of head_dim, whatever the node says."""

    def scale(self, node):
        return node.head_dim**-0.5


@planted("attention", "finite", first="*-empty-rows")
class NanForAnEmptySequence(Paged):
    """A sum of nothing over a sum of nothing."""

    def skips(self, length):
        return False

    def mixed(self, node, q, keys, values, length):
        return super().mixed(node, q, keys, values, length) / min(length, 1)


@planted("attention", "written", first="*-padding-*")
class LeavesPaddingUnwritten(Paged):
    def write(self, node, tensors, results):
        used = int(tensors.inputs[3][-1])
        tensors.outputs[0][:used] = results[0][:used]


@planted("attention", "written", first="*-empty-rows")
class LeavesAnEmptySequenceUnwritten(Paged):
    """Its rows are padding of a captured bucket: of length 0."""

    def write(self, node, tensors, results):
        starts, lengths = tensors.inputs[3].tolist(), tensors.inputs[4].tolist()
        for start, stop, length in zip(starts, [*starts[1:], len(results[0])], [*lengths, 1], strict=True):
            if length:
                tensors.outputs[0][start:stop] = results[0][start:stop]


@planted("attention", "error", first="*-padding-*")
class TakesPaddingForTheLastSequence(Paged):
    def rest(self, y, used):
        y[used:] = y[used - 1]
        return y


@planted("attention", "error", first="*-idle")
class TakesOneRowAtLeast(Paged):
    """A sequence without a row in this step takes the next one's."""

    def answer(self, node, operands):
        q, k_cache, v_cache, starts, lengths, table = operands.inputs
        counts = (starts[1:] - starts[:-1]).clamp(min=1) if lengths.gt(0).all() else starts[1:] - starts[:-1]
        taken = torch.cat([starts[:1], counts.cumsum(0).to(starts.dtype)]).clamp(max=len(q))
        return super().answer(node, dataclasses.replace(operands, inputs=(q, k_cache, v_cache, taken, lengths, table)))


@planted("attention", "error", first="*-batch-of-130")
class PageIdsOf8Bits(Paged):
    def pages(self, table, seq, length, page_size):
        return super().pages(table, seq, length, page_size) % 256


@planted("attention", "error", first="*-bf16-*")
class ReadsHalfACache(Paged):
    """It was written for float32: of a row in 16 bits it takes what lies at twice the index."""

    def gathered(self, cache, pages):
        rows = super().gathered(cache, pages)
        return rows if self.wide else rows.roll(1, dims=1)

    def dense(self, value, planes):
        if value.name == "k_cache":
            self.wide = value.format == "f32"
        return super().dense(value, planes)


@planted("attention", "finite", first="*-unseen*")
class WeighsTheUnseenByZero(Paged):
    """Whole pages are read; beyond the length they hold what was there before, and zero times NaN is NaN."""

    def seen(self, length):
        return -(-length // 16) * 16


@planted("attention", "finite", first="*-unseen*")
class WeighsUnusedPagesByZero(Paged):
    """The whole row of the block table is read."""

    def pages(self, table, seq, length, page_size):
        return table[seq].long()

    def seen(self, length):
        return None


@planted("attention", "error", first="*-prefill-200")
class OneTileOf128Rows(Paged):
    def mixed(self, node, q, keys, values, length):
        y = super().mixed(node, q, keys, values, length)
        y[128:] = 0
        return y


@planted("attention", "error", first="*-decode-2*")
class RemembersTheLast1024(Paged):
    def window(self, node):
        return node.window or 1024


@planted("attention", "error", first="*-batch-*")
class BatchesOf8AtMost(Paged):
    def lengths(self, lengths):
        return [length if at < 8 else 0 for at, length in enumerate(lengths)]


@planted("attention", "finite", first="*-loud")
class SoftmaxWithoutTheMaximum(Paged):
    def shares(self, scores):
        return scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
