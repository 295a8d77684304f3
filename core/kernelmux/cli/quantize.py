"""`kernelmux quantize`: a model's weights in another format, and what that costs, tensor by tensor.

As a GGUF file, or a folder where they are FP8, of which GGUF has no type.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.common import DeviceName, Json, ModelPath, refuse_overwriting
from kernelmux.cli.output import print_json, print_table, say, tell
from kernelmux.cli.progress import ProgressBar
from kernelmux.errors import KernelmuxError, label

if TYPE_CHECKING:
    from kernelmux.models.targets import Rule, Target
    from kernelmux.run.quantized import QuantizedTensor


def quantize(
    model: ModelPath,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORMAT", help="Of matrices: Q4_K, Q8_0, f16, fp8_row and others.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The GGUF file to write; of FP8 a new folder.", show_default=False
        ),
    ],
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="PATTERN=FORMAT",
            help="For some tensors, as 'blk.*.ffn_down.weight=Q6_K'; the first that matches wins. May be repeated.",
        ),
    ] = None,
    device: DeviceName = "cpu",
    json: Json = False,
) -> None:
    """Store a model's weights in another format, and tell the error of each tensor.

    Norms and other vectors stay float32, and the metadata what it is. A tensor whose rows do not divide into a format's
    blocks takes one of shorter blocks, and that is told. FP8 is written as a folder, of a folder.
    """
    from kernelmux.models.targets import FOLDER_FORMATS, parse_rule, written_format

    format = written_format(to, "--to")
    rules = [parse_rule(text, format) for text in rule or ()]
    refuse_overwriting("--output", output, model=model)
    with ProgressBar() as bar:
        with bar.stage("opening the model"):
            from kernelmux.run.progress import QUANTISING, Progress

            write = _folder if format in FOLDER_FORMATS else _file
            planned, tensors = write(model, output, format, rules, device)
        total, written = sum(target.weight.nbytes for target in planned), []
        bar.begin(QUANTISING)
        for tensor in tensors:
            written.append(tensor)
            bar.show(Progress(QUANTISING, sum(each.bytes_before for each in written), total))
    described = _describe(model, output, written)
    if json:
        print_json(described)
    else:
        _tell(described)


Writing = tuple[list["Target"], Iterator["QuantizedTensor"]]
"""What each tensor is to be stored as, and what is told of each once it is written."""


def _file(model: Path, output: Path, format: str, rules: Sequence[Rule], device: str) -> Writing:
    from kernelmux.contract.device import find_device
    from kernelmux.models.exported import exported
    from kernelmux.models.targets import targets
    from kernelmux.run.quantized import write_quantized

    file, target = exported(model), find_device(device)
    planned = targets(file.weights.values(), format, rules)
    return planned, write_quantized(file, output, format, planned, target)


def _folder(model: Path, output: Path, format: str, rules: Sequence[Rule], device: str) -> Writing:
    from kernelmux.contract.device import find_device
    from kernelmux.models import open_model
    from kernelmux.models.folder import stored_folder
    from kernelmux.models.fp8_folder import folder_targets
    from kernelmux.run.quantized_folder import write_folder

    if not os.path.isdir(model):
        open_model(model)
        needed = f"{format} is written as a folder, by the config.json and tokenizer.json of a folder"
        raise KernelmuxError(f"{model}: {needed}: name the model's own, or --to Q8_0 for a GGUF file")
    if output.suffix == ".gguf":
        raise KernelmuxError(f"--output {output}: GGUF has no type for {format}, which is written as a folder")
    open_model(model)
    stored, target = stored_folder(model), find_device(device)
    planned = folder_targets(stored, format, rules)
    return planned, write_folder(stored, output, format, planned, target)


def _describe(model: Path, output: Path, written: list[QuantizedTensor]) -> dict[str, Any]:
    from dataclasses import asdict

    before, after = (sum(sizes) for sizes in zip(*((each.bytes_before, each.bytes) for each in written), strict=True))
    return {
        "model": str(model),
        "output": str(output),
        "bytes_before": before,
        "bytes": after,
        "tensors": [{**asdict(each), "name": label(each.name)} for each in written],
    }


def _tell(described: dict[str, Any]) -> None:
    """Alike tensors of all layers as one row, with the least and the largest error; then what was not as asked."""
    from kernelmux.graph.formats import human_bytes
    from kernelmux.plan.table import grouped, members

    tensors = {tensor["name"]: tensor for tensor in described["tensors"]}
    rows = []
    for name, (was, format) in grouped((name, (each["was"], each["format"])) for name, each in tensors.items()):
        alike = [tensors[member] for member in members(name, tensors)]
        rows.append((name, was, format, human_bytes(sum(each["bytes"] for each in alike)), _span(alike)))
    print_table(("tensor", "was", "is", "size", "NMSE"), rows)
    tell()
    for reason, count in Counter(each["reason"] for each in tensors.values() if each["reason"]).items():
        say(f"{count} of {len(tensors)} tensors: {reason}")
    before, after = (human_bytes(described[key]) for key in ("bytes_before", "bytes"))
    say(f"{described['output']}: {after} of weights, of {before}")


def _span(alike: Sequence[Mapping[str, Any]]) -> str:
    least, most = (f"{pick(each['error'] for each in alike):.2e}" for pick in (min, max))
    return least if least == most else f"{least}..{most}"
