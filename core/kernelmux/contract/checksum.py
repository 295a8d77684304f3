"""A number that tells whether tensors hold the same bytes, made at the speed of memory on whatever device has them.

Enters: bytes on a device. Leaves: 64 bits, the same on any device. They find damage and other contents, not forgery.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK = 2**12
"""Words of 8 bytes whose sum is made first: their places have a factor each, and so have the places of the chunks."""
CHUNKS = 2**17
"""Places of chunks after which their factors begin anew: 4 GiB."""
AT_ONCE, AT_ONCE_A_THREAD = 2**11, 2**5
"""Chunks that are summed by one call on a device, at most, and in host memory by each thread: what its cache holds."""


def checksum(data: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Of bytes, contiguous and uint8, that follow on `first` whole chunks: one int64, on their device.

    The sum of m(c) k(j) (w ^ w >> 32) over the words w, padded with zeros, at place j of chunk c, modulo 2^64, so that
    parts which begin at whole chunks may be summed apart and added. All m and k are odd and look random: any changed
    word changes the sum, and changes of several cancel by chance only. Without the shift two changed top bits always
    would, whatever their factors.
    """
    import torch

    at_once = AT_ONCE
    if data.device.type == "cpu":
        at_once = min(AT_ONCE_A_THREAD * torch.get_num_threads(), AT_ONCE)
    if data.storage_offset() % 8:
        data = data.clone()
    end = len(data) // 8
    full, left = divmod(end, CHUNK)
    words, rest = data[: end * 8].view(torch.int64), data[end * 8 :]
    chunks = words[: full * CHUNK].view(full, CHUNK)
    buffer = torch.empty(max(min(at_once, full), 1), CHUNK, dtype=torch.int64, device=data.device)
    sums = [_sum(chunks[at : at + at_once], buffer, first + at) for at in range(0, full, at_once)]
    if left:
        sums.append(_sum(words[full * CHUNK :].view(1, left), buffer, first + full))
    if len(rest):
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[: len(rest)] = rest
        sums.append(_sum(last.view(torch.int64).view(1, 1), buffer, first + full, left))
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device=data.device)


def hex_checksum(total: torch.Tensor) -> str:
    """A checksum as text of 16 digits."""
    return f"{int(total) % 2**64:016x}"


def _sum(chunks: torch.Tensor, buffer: torch.Tensor, first: int, start: int = 0) -> torch.Tensor:
    """Of chunks [n, up to CHUNK] from number `first` on, whose words begin at place `start`."""
    import torch

    of_words, of_chunks = _factors(str(chunks.device))
    count, width = chunks.shape
    mixed = buffer[:count, :width]
    torch.bitwise_right_shift(chunks, 32, out=mixed)
    mixed.bitwise_xor_(chunks).mul_(of_words[start : start + width])
    first %= CHUNKS
    return (mixed.sum(1) * of_chunks[first : first + count]).sum()


@cache
def _factors(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the places of words and of chunks: multiples of the golden ratio, their bits mixed as by splitmix64, odd."""
    import torch

    numbers = torch.arange(1, CHUNK + CHUNKS + 1, device=device) * -0x61C8864680B583EB
    numbers = (numbers ^ numbers >> 30) * -0x40A7B892E31B1A47
    numbers = (numbers ^ numbers >> 27) * -0x6B2FB644ECCEEE15
    numbers = (numbers ^ numbers >> 31) | 1
    of_words, of_chunks = numbers[:CHUNK], numbers[CHUNK:]
    return of_words, torch.cat([of_chunks, of_chunks[:AT_ONCE]])
