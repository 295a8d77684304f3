"""`kernelmux compare`: what it says of two plans, and what it refuses."""

from __future__ import annotations

import json

import pytest

from command import call_command

F32 = "*=torch:f32,torch:sdpa,torch:rows"
BF16 = f"{F32};mul_mat=torch:bf16"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A small text.\nAnd another one, a little longer.\n")
    return path


def test_tokens_and_nodes_are_told(tiny, text):
    done = call_command("compare", tiny, F32, BF16, "--text", text, "--nodes", 8)
    assert done.code == 0, done.err
    assert "nats a token; worst" in done.out
    assert "likeliest token the same after" in done.out
    assert "\nin steps of " in done.out
    assert done.out.count("perplexity") == 2
    _, worst, *_ = [line for line in done.out.splitlines() if "\t" in line]
    node, op, kernel, own, *_ = worst.split("\t")
    assert (op, kernel) == ("mul_mat", "torch:bf16")
    assert float(own) > 0
    assert node.startswith(("blk.", "logits"))


def test_json_has_all_of_it_and_is_saved(tiny, text, tmp_path):
    saved = tmp_path / "found.json"
    done = call_command("compare", tiny, "exact", F32, "--prompts", text, "--nodes", 4, "--json", "--save", saved)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document == json.loads(saved.read_text())
    assert [plan["asked"] for plan in document["plans"]] == ["exact", F32]
    assert document["tokens"]["agreement"] == 1.0
    assert document["tokens"]["tokens"] > 20
    assert {"node", "own", "gathered", "kernel", "stated", "row", "head"} <= set(document["nodes"][0])


def test_a_policy_a_lock_file_and_a_backend_are_plans(tiny, text, tmp_path):
    (tmp_path / "p.toml").write_text('[defaults]\nuse = ["torch"]\n')
    assert call_command("plan", tiny, "--policy", tmp_path / "p.toml", "--lock", tmp_path / "p.lock").code == 0
    done = call_command(
        "compare", tiny, tmp_path / "p.toml", tmp_path / "p.lock", "--text", text, "--nodes", 0, "--json"
    )
    document = json.loads(done.out)
    assert len({plan["fingerprint"] for plan in document["plans"]}) == 1
    assert (document["tokens"]["divergence"], document["nodes"]) == (0.0, [])
    assert call_command("compare", tiny, "torch", "reference", "--text", text, "--nodes", 0).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["torhc", "exact"], "torhc is no plan"),
        (["exact", "no.toml"], "no.toml: the policy file cannot be read"),
        (["exact", "mul_mat=nobody"], "is no plan"),
        (["exact", "torch", "--text", "gone.txt"], "gone.txt: no text that can be read"),
        (["exact", "torch", "--text", "/dev/null"], "has no text in it"),
        (["exact", "torch", "--text", "a", "--prompts", "b"], "it stands in place of --text"),
    ],
)
def test_what_is_no_plan_or_text_is_one_line(tiny, words, said):
    done = call_command("compare", tiny, *words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_text_of_one_token_has_nothing_to_compare(tiny, tmp_path):
    (tmp_path / "text.txt").write_text("a")
    done = call_command("compare", tiny, "exact", F32, "--text", tmp_path / "text.txt")
    assert (done.code, done.out) == (2, "")
    assert "text.txt: has one token, and none that comes next" in done.err
