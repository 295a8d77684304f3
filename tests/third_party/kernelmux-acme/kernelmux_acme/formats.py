"""acme_ternary: weights of -1, 0 and 1, four to a byte, with a float16 scale for every 32 columns of a row."""

from kernelmux.graph.formats import Format, Plane

COLUMNS = 32


def signs(codes):
    """int8 [..., columns] of bytes [..., columns / 4]: the lowest two bits are the first column, plus one."""
    import torch

    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts & 3).to(torch.int8) - 1).flatten(-2)


def dequantize(planes):
    codes, scales = planes
    return signs(codes).float() * scales.float().repeat_interleave(COLUMNS, dim=-1)


def draw(shape, generator):
    import torch

    rows, columns = shape
    trits = torch.randint(3, (rows, columns // 4, 4), generator=generator, device=generator.device)
    codes = (trits << torch.arange(0, 8, 2, device=generator.device)).sum(dim=-1).to(torch.uint8)
    scales = torch.rand(rows, columns // COLUMNS, generator=generator, device=generator.device)
    return codes, (scales * columns**-0.5).half()


TERNARY = Format(
    "acme_ternary",
    (Plane("codes", "uint8", cols=COLUMNS, items=COLUMNS // 4), Plane("scales", "float16", cols=COLUMNS)),
    block=COLUMNS,
    dequantize=dequantize,
    draw=draw,
)
