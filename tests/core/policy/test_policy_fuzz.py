"""Damaged policy files: a policy, or one PolicyError that names file and line; never anything else."""

import random
import re
from importlib import resources
from pathlib import Path

import pytest

from kernelmux.errors import PolicyError
from kernelmux.policy.grammar import TABLES, Document
from kernelmux.policy.policy import Policy, parse_policy

EVERY_KEY = """\
# Every key of every table.
forbid = ["old", "torch:slow"]
fuse = true

[[rule]]
op = ["mul_mat", "qkv"]
node = "blk.*.attn_?"
layer = "0..3"
m = "1..16"
weight = ["Q4_0", "q4_k"]
dtype = "f32"
device = "cuda"
capability = "9.0"
where = { n = "4096..", weight_format = ["Q4_0", "Q8_0"] }
use = ["triton:int4", "reference"]
max_error = 1e-4
on_unsupported = "next"
on_error = "next"

[[rule]]
m = 1
use = "torch"

[[require]]
op = "attention"
node = ["blk.0.*", "blk.1.*"]
layer = 7
m = "17.."
weight = "F16"
dtype = ["bf16", "f16"]
device = "cpu"
capability = "8.6"
where = { head_dim = 128 }
kernel = ["torch:sdpa", "reference"]

[defaults]
use = ["torch", "reference"]
max_error = 1e-3
on_error = "error"

[kv]
format = "bf16"

[weights]
copies = 2
"""

EXAMPLES = Path(__file__).parents[3] / "examples" / "policies"
OURS = [resources.files("kernelmux.policy").joinpath(f"{name}.toml") for name in ("default", "exact")]
FILES = [*OURS, *sorted(EXAMPLES.glob("*.toml"))]
VALID = [EVERY_KEY, *(path.read_text("utf-8") for path in FILES)]
MUTATIONS = 10_000
PARTS = 10

NOISE = [*"\"'[]{}=.,#\n\\-0é\x00\u2028", "[[", "]]", '"""', "'''", "\r", "\\u", "1e999", "_", "\ud7ff", "\U0001f642"]
VALUES = ["5", "-1", "1.5", "true", "nan", "inf", "[]", "[5]", "[[1]]", "{}", "{ a = 1 }", "1979-05-27", "12:00:00"]
VALUES += ['""', '"x"', '["x", 5]', '["x", ["y"]]', '"1..16"', '"Q4_0"', '"cpu"', '"9.0"', '"next"', "0x10", "9" * 30]
KEYS = [key for table in (Document, *TABLES.values()) for key in table.model_fields]
HEADINGS = [bracket.format(name) for name in TABLES for bracket in ("[{}]", "[[{}]]", "[{}.x]")]


def _mutate(chance, text):
    """The text with a few characters, a value, a key, a heading or a line changed."""
    if chance.randrange(3) == 0 or not text.strip():
        at, length = chance.randrange(len(text) + 1), chance.randrange(4)
        return text[:at] + chance.choice(NOISE) + text[at + length :]
    lines = text.split("\n")
    at = chance.randrange(len(lines))
    key, equals, value = lines[at].partition(" = ")
    kind = chance.randrange(6)
    if kind == 0:
        lines[at] = f"{key} = {chance.choice(VALUES)}" if equals else chance.choice(HEADINGS)
    elif kind == 1:
        lines[at] = f"{chance.choice(KEYS)} = {value or chance.choice(VALUES)}"
    elif kind == 2:
        lines.insert(chance.randrange(len(lines)), lines[at])
    elif kind == 3:
        lines.insert(at, f"{chance.choice(KEYS)} = {chance.choice(VALUES)}")
    elif kind == 4:
        lines.insert(at, chance.choice(HEADINGS))
    else:
        del lines[at]
    return "\n".join(lines)


@pytest.mark.parametrize("text", VALID)
def test_what_is_damaged_here_is_sound(text):
    assert _complaint(text) == ""


def test_every_key_is_damaged_somewhere():
    for name, table in TABLES.items():
        part = EVERY_KEY.partition(f"[{name}]")[2].partition("\n[")[0].partition("\n[")[0]
        assert set(table.model_fields) <= set(re.findall(r"^(\w+) = ", part, re.MULTILINE))


@pytest.mark.parametrize("seed", range(PARTS))
def test_damage_is_a_policy_or_one_error_that_names_file_and_line(seed):
    chance = random.Random(seed)
    sound = 0
    for _ in range(MUTATIONS // PARTS):
        text = chance.choice(VALID)
        for _ in range(chance.randint(1, 3)):
            text = _mutate(chance, text)
        message = _complaint(text)
        sound += not message
        if message:
            named = re.fullmatch(r"p\.toml:(\d+): [^\n\r]+", message)
            assert named, (text, message)
            assert 1 <= int(named[1]) <= text.count("\n") + 1, (text, message)
    # Both are reached, else nothing is shown.
    assert MUTATIONS // PARTS * 0.02 < sound < MUTATIONS // PARTS * 0.6


def _complaint(text):
    """What is wrong with a policy's text; empty where it is one."""
    try:
        policy = parse_policy(text, "p.toml")
    except PolicyError as error:
        return str(error)
    assert isinstance(policy, Policy)
    # Whatever it says, its rules can be named, and its row bounds are numbers.
    assert all(policy.where(index) for index in (None, *range(len(policy.document.rule))))
    assert all(bound > 0 for bound in policy.row_bounds)
    return ""
