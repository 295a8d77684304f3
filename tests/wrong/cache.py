"""copy, embed and qkv_rope_copy: rows that are scattered and gathered."""

from __future__ import annotations

import dataclasses

import torch

from kernelmux.graph.formats import as_tuple, quantize_planes
from wrong.kernel import Right, planted


class Scatter(Right):
    """Row by row into the caches, as the contract says."""

    def slot(self, slot):
        return slot

    def skips(self, slot):
        return slot < 0

    def launch(self, node, tensors):
        k, v, slots, *caches = tensors.inputs
        for rows, cache, value in zip((k, v), map(as_tuple, caches), node.inputs[3:], strict=True):
            stored = tuple(plane.new_empty(len(rows), *plane.shape[2:]) for plane in cache)
            quantize_planes(value.format, rows.view(len(rows), *value.shape[2:]), stored)
            for plane, part in zip(cache, stored, strict=True):
                flat = plane.view(-1, plane.shape[2] * plane.shape[3])
                for row, slot in zip(part.flatten(1), slots.tolist(), strict=True):
                    if not self.skips(slot):
                        self.put(flat, self.slot(slot), row)

    def put(self, flat, slot, row):
        flat[slot] = row


@planted("copy", "inputs")
class WritesPaddingIntoTheLastSlot(Scatter):
    """Slot -1 counts from the end."""

    def skips(self, slot):
        return False


@planted("copy", "inputs")
class WritesPaddingIntoTheFirstSlot(Scatter):
    def skips(self, slot):
        return False

    def slot(self, slot):
        return max(slot, 0)


@planted("copy", "inputs")
class ClearsTheNextSlot(Scatter):
    """It would be written soon, but may be another sequence's."""

    def put(self, flat, slot, row):
        super().put(flat, slot, row)
        flat[(slot + 1) % len(flat)] = 0


@planted("copy", "inputs", first="*-fp8_row-*")
class ClearsTheScaleOfTheNextSlot(Scatter):
    """Its numbers are left, and worth nothing without it."""

    def put(self, flat, slot, row):
        super().put(flat, slot, row)
        if len(row) < 32:
            flat[(slot + 1) % len(flat)] = 0


@planted("copy", "guards")
class WritesPaddingBeforeTheCache(Scatter):
    def skips(self, slot):
        return False

    def put(self, flat, slot, row):
        if slot < 0:
            flat.as_strided((1,), (1,), flat.storage_offset() - 1).copy_(row[-1:])
        else:
            super().put(flat, slot, row)


@planted("copy", "error")
class OneSlotOff(Scatter):
    def put(self, flat, slot, row):
        super().put(flat, (slot + 1) % len(flat), row)


@planted("copy", "error")
class TakesSlotsForARun(Scatter):
    """From the first slot on."""

    def launch(self, node, tensors):
        k, v, slots, *caches = tensors.inputs
        run = (slots[0] + torch.arange(len(slots))) % (caches[0].shape[0] * caches[0].shape[1])
        run[slots < 0] = -1
        super().launch(node, dataclasses.replace(tensors, inputs=(k, v, run, *caches)))


@planted("copy", "error")
class WritesKeysForValues(Scatter):
    def launch(self, node, tensors):
        k, _, *rest = tensors.inputs
        super().launch(node, dataclasses.replace(tensors, inputs=(k, k, *rest)))


@planted("copy", "error", first="*-far")
class SlotsOf16Bits(Scatter):
    def slot(self, slot):
        return slot % 65536


@planted("copy", "error", first="*-m512-*")
class RowsAfterThe256thAreLost(Scatter):
    def launch(self, node, tensors):
        k, v, slots, *caches = tensors.inputs
        kept = torch.where(torch.arange(len(slots)) < 256, slots, -1)
        super().launch(node, dataclasses.replace(tensors, inputs=(k, v, kept, *caches)))


@planted("copy", "error", first="*-f16-*")
class CopiesIntoFloat16AsBf16(Scatter):
    """Both have 16 bits."""

    def put(self, flat, slot, row):
        super().put(flat, slot, row.bfloat16() if flat.dtype == torch.float16 else row)


@planted("copy", "inputs")
class ChangesItsSlots(Scatter):
    def launch(self, node, tensors):
        super().launch(node, tensors)
        tensors.inputs[2].fill_(-1)


class Fresh(Right):
    """Ids by the reference."""

    def ids(self, ids, rows):
        return ids

    def answer(self, node, operands):
        ids, *tables = (*operands.inputs, *operands.weight)
        return (tables[0][self.ids(ids.long(), len(tables[0]))],)


@planted("embed", "error")
class OneIdOff(Fresh):
    def ids(self, ids, rows):
        return (ids + 1) % rows


@planted("embed", "error", first="*-ends")
class NeverTheLastRow(Fresh):
    """Ids are held below rows - 1."""

    def ids(self, ids, rows):
        return ids.clamp(max=rows - 2)


@planted("embed", "error", first="*-ends")
class NeverTheFirstRow(Fresh):
    """Where 0 means padding."""

    def ids(self, ids, rows):
        return ids.clamp(min=1)


@planted("embed", "error", first="*-vocabulary")
class IdsOf16Bits(Fresh):
    """Vocabularies of today have 128 thousand rows and more."""

    def ids(self, ids, rows):
        return ids % 65536


@planted("embed", "error")
class EachIdOnce(Fresh):
    """Of an id that comes again, it takes the next row."""

    def ids(self, ids, rows):
        again = torch.tensor([int(i) in ids[:at].tolist() for at, i in enumerate(ids)], dtype=torch.int64)
        return (ids + again) % rows


@planted("qkv_rope_copy", "error")
class DropsTheBiasBeforeTheTurn(Right):
    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, bias=()))


@planted("qkv_rope_copy", "error")
class IgnoresTheDivisorsOfTheTurn(Right):
    def answer(self, node, operands):
        ones = tuple(torch.ones_like(divisors) for divisors in operands.weight[3:])
        return super().answer(node, dataclasses.replace(operands, weight=(*operands.weight[:3], *ones)))


@planted("qkv_rope_copy", "error")
class AlwaysPairsNeighbours(Right):
    def answer(self, node, operands):
        rotation = dataclasses.replace(node.rotation, pairing="adjacent")
        return super().answer(dataclasses.replace(node, rotation=rotation), operands)


@planted("qkv_rope_copy", "error")
class CountsItsPositions(Right):
    def answer(self, node, operands):
        x, positions, *rest = operands.inputs
        counted = positions[0] + torch.arange(len(positions), dtype=torch.int32)
        return super().answer(node, dataclasses.replace(operands, inputs=(x, counted, *rest)))


@planted("qkv_rope_copy", "error", first="*-bias*")
class TurnsBeforeTheBias(Right):
    def answer(self, node, operands):
        q, k_cache, _ = super().answer(node, dataclasses.replace(operands, bias=()))
        return q + operands.bias[0] if operands.bias else q, k_cache, super().answer(node, operands)[2]


@planted("qkv_rope_copy", "inputs")
class CachesPaddingToo(Right):
    """Slot -1 counts from the end."""

    def answer(self, node, operands):
        x, positions, slots, *caches = operands.inputs
        wrapped = slots % (caches[0].shape[0] * caches[0].shape[1])
        return super().answer(node, dataclasses.replace(operands, inputs=(x, positions, wrapped, *caches)))


@planted("qkv_rope_copy", "error")
class CachesKeysUnturned(Right):
    def answer(self, node, operands):
        q, _, v_cache = super().answer(node, operands)
        x, positions, *rest = operands.inputs
        still = dataclasses.replace(operands, inputs=(x, torch.zeros_like(positions), *rest))
        return q, super().answer(node, still)[1], v_cache


@planted("copy", "error", first="bf16-m1-*")
class TruncatesASingleRow(Scatter):
    """A sequence that decodes alone; what the cache held before is most of it."""

    def launch(self, node, tensors):
        super().launch(node, tensors)
        k, v, slots, *caches = tensors.inputs
        if len(k) == 1 and node.inputs[3].format == "bf16" and int(slots[0]) >= 0:
            for row, cache in zip((k, v), caches, strict=True):
                cut = (row.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
                cache.view(-1, cut.shape[1])[int(slots[0])] = cut[0]


@planted("copy", "finite", first="*-beyond-f16")
class SaturatesInF16(Scatter):
    def put(self, flat, slot, row):
        super().put(flat, slot, row.clamp(-65504, 65504) if row.dtype == torch.float16 else row)


@planted("copy", "finite", first="*-beyond-f16")
class StoresBf16ThroughF16(Scatter):
    def put(self, flat, slot, row):
        super().put(flat, slot, row.half() if row.dtype == torch.bfloat16 else row)


@planted("copy", "error", first="*-below-f16")
class FlushesWhatF16HoldsInFewerBits(Scatter):
    def put(self, flat, slot, row):
        super().put(flat, slot, row * (row.abs() > 6.1e-5) if row.dtype == torch.float16 else row)
