"""Makes docs/conformance.md: the text here, and what the reference and torch backends do on the CPU's smoke cases.

`python docs/conformance.py` (`--check` only compares). Backends that are installed beside these two are left alone.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("conformance.md")
BACKENDS = ("reference", "torch")

HEAD = """# Conformance

The suite runs a backend's kernels on named cases of every op, holds them against float64, and checks what they touch.
Made by `python docs/conformance.py`, which runs the smoke cases of {backends} on the CPU.

## Hook a backend up

One line in one test file of the backend; pytest finds the rest, and new cases arrive with kernelmux:

```python
import kernelmux.conformance

TestTorch = kernelmux.conformance.suite("torch")
```

`suite("hello", device="cuda")` runs it on a GPU. The tests are ordinary ones, a case each: a refused case is skipped
with the kernel's reason. `--kernelmux-case GLOB` picks cases, `--kernelmux-html FILE` writes a page to read,
`--kernelmux-json FILE` one for scripts; `--junitxml` carries each case's numbers as properties.

Without pytest:

    kernelmux check                                             every installed backend
    kernelmux check --backend hello --smoke                     one backend, the cases that run in seconds
    kernelmux check --backend hello --fuzz 300                  random cases, of which failures are made small
    kernelmux check --kernel torch:f32 --case 'rope-*'          one kernel, some cases
    kernelmux check --list --op attention                       the cases, one a line
    kernelmux check --device cuda --html report.html            on a GPU, as a page to read
    kernelmux check --device cuda --large --case '*-huge-*'     offsets beyond 2^31 elements and bytes
    kernelmux check --shard 2/8                                 a share of the cases, for processes side by side

Exit code 1 says that something failed, 2 that the command is wrong. Each failure comes with the command that runs that
case alone again. One that goes away alone, tried in a fresh process, is told as "fails only after other cases", and the
command runs those before it: `--until CASE` stops there. Of each kernel {again} of either sort are tried. A message
says what the worst element is, what was expected, and where the wrong ones sit: rows, heads, columns or blocks, all of
them or some. A case that has been running for a minute is named on stderr, for a kernel that does not come back.

## What is checked

{checks}

Not held against a kernel: zero in place of what is below float32's smallest normal number (1.2e-38), or half a step of
float16 among its subnormals; which way a tie is rounded; infinity within 1 % of the largest number of its format.

A case has fixed shapes, formats and numbers: its name is the seed. Some are written by hand, in the op's file. The
others, as `mul_mat-drawn:m=4,n=33,k=768,format=Q4_K,bias`, are drawn from the op's **domain**, which stands there too
(docs/ops.md): the extents, formats, attributes and spreads of values that real models have. Together they hold every
pair of choices that go together; both sides of every power of two that an extent reaches, and of three of them where
kernels block by those, with and without what may be switched and with each size of block; short, middle and long
extents with each other and with every choice. A large extent is paired with small others, so that a case takes
milliseconds. A test proves the coverage from the domain.

One case of each op, of several rows if the kernel takes any, is also run in every format that the kernel declares, one
value at a time, then all that may have it: `add-m5-n576@outputs0=f16`, `add-m5-n576@all=f16`.

## Random cases

    kernelmux check --fuzz 300 --seed 1 --backend hello         300 random cases of each op
    kernelmux check --fuzz 5000 --op rope --device cuda         many of one, on a GPU

The cases are random points of the domains, the same ones for the same seed; a kernel runs those that it takes, and the
others are not counted. Of those on which a kernel fails one check, or raises at one place, the first is made smaller
while it still fails so: extents halved, attributes dropped, values plain; how many more do is said, and counted. It is
printed as a line of a file of cases, goes with the case that was drawn to `fuzz-SEED.json` (`--fuzz-cases FILE`), and
comes with the command that runs it; one that goes away alone with that of the random cases up to it:

    kernelmux check --kernel hello:f32 --case silu-drawn:m=3,n=101 --cases fuzz-1.json
    kernelmux check --kernel hello:f32 --op silu --fuzz 300 --seed 1 --until silu-drawn:m=40,n=8193

`make test-slow` runs 300 an op on reference and torch, and all cases of each backend; `make test` their smoke cases.

A smoke case is launched over and over, {many} times one case in {every}: with other inputs at the same addresses,
another binding launched by turns, and after a launch in which torch raises. Cases named `*-huge-offsets` have a weight
or cache of more than 2^31 elements and bytes, whose numbers are a small case's: they are run by `--large`, and refused
with the reason where memory does not suffice.

## What is caught

The suite is tried itself, with kernels that are right but for one mistake each, in tests/wrong: each must be caught by
the check that is named for it, and the right ones must pass.

{planted}

## Known failures

A backend may keep a list of what it knows to fail: `suite("hello", known_failures="known_failures.toml")`, or
`kernelmux check --known known_failures.toml`. An entry whose case passes is stale, and fails.

```
[[failure]]
case = "rope-yarn-*"           # a name, or a pattern
kernel = "hello:f32"
reason = "positions are read as int16"
link = "https://example.org/hello/issues/7"
```

## The matrix

{legend}

"""

CHECKS = (
    (
        "error",
        "The result is within the bound (NMSE) that the kernel declares; no element, row or column is far off; "
        "the last row alone is right as well.",
    ),
    ("finite", "NaN and infinity where float64 has them, and nowhere else."),
    ("written", "Every element of every output is written, whatever the memory held before."),
    (
        "scales",
        "Of a format with scales, each is its block's largest magnitude over the largest that an element holds; sums "
        "are those of what is stored (told as error).",
    ),
    (
        "repeatable",
        "The same launch gives the same bytes, whatever was launched or bound before, and however often; also after a "
        "launch that raised, and where of the inputs positions, ids, a block table, lengths or rows alone change.",
    ),
    (
        "process",
        "What a process shares is left as it was: torch's random numbers, threads, dtype, gradients and precision of "
        "products, whether the smallest numbers become zero.",
    ),
    ("guards", "Nothing is written beside an input, an output or the workspace."),
    ("inputs", "Binding and launching leave inputs, packed weights and the model alone, but for what the op updates."),
    ("in place", "Right as well where the op lets outputs be inputs' memory, one pair at a time and all at once."),
    ("captured", "On CUDA, a replayed graph gives the bytes of the launch itself."),
    (
        "declarations",
        "The bound is at most 1e-2; `prepare` holds as many bytes as `packed_bytes` says, and the same ones for all "
        "kernels that share a packed form's name; formats do not depend on the row count, which a plan asks them "
        "before; on CUDA, a captured call has no more device launches than `launches` says.",
    ),
    ("raises", "Nothing raises: a kernel that cannot take a case declines it, with a reason."),
)

LEGEND = """Cases by op and weight format on each kernel: ✓ passed, – refused, ✗ failed, ! failed as known; in brackets,
the tightest bound on their NMSE (where an output is stored in fewer bits, their rounding comes on top). Below each
matrix, why cases were refused. The page that `kernelmux check --html` writes adds each kernel's worst case."""


def planted_table() -> str:
    """What tests/wrong plants: a row a family of mistakes and check, each mistake by its class's name in words."""
    sys.path.insert(0, str(PAGE.parents[1] / "tests"))
    from wrong import PLANTED

    kinds: dict[tuple[str, str], list[str]] = {}
    for planted in PLANTED:
        about = (sys.modules[planted.kernel.__module__].__doc__ or "").strip().partition("\n")[0].rstrip(".")
        words = re.sub(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z0-9])(?=[A-Z][a-z])", " ", planted.kernel.__name__).lower()
        kinds.setdefault((about, planted.check), []).append(words)
    rows = (f"| {about} | {'; '.join(words)} | {check} |" for (about, check), words in sorted(kinds.items()))
    return "\n".join(["| of | kind | caught by |", "|---|---|---|", *rows])


def render() -> str:
    """The page: its head, then a matrix a backend."""
    from kernelmux.conformance import Filter, jobs
    from kernelmux.conformance.alone import MOST
    from kernelmux.conformance.report import make_report, to_markdown
    from kernelmux.conformance.run import EVERY, MANY
    from kernelmux.contract import registry

    current = registry.current()
    outcomes = [job.run(current) for name in BACKENDS for job in jobs(name, current, wanted=Filter(smoke=True))]
    report = make_report(outcomes, current.backends, "cpu")
    checks = "\n".join(["| check | holds |", "|---|---|", *(f"| {name} | {what} |" for name, what in CHECKS)])
    head = HEAD.format(
        backends=" and ".join(BACKENDS),
        checks=checks,
        legend=LEGEND,
        planted=planted_table(),
        many=MANY,
        again=MOST,
        every=EVERY,
    )
    return head + to_markdown(report)


if __name__ == "__main__":
    os.environ["KERNELMUX_BACKENDS"] = ",".join(BACKENDS)
    if "--check" in sys.argv:
        fresh = PAGE.exists() and PAGE.read_text("utf-8") == render()
        sys.exit(0 if fresh else "docs/conformance.md is stale: python docs/conformance.py")
    PAGE.write_text(render(), "utf-8")
