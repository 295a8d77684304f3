"""A backend of somebody else's: installed with pip, chosen by a policy, run on the real model, uninstalled again.

It brings two ops and a weight format, which are as good as core's: in the suite, in policies, in plans, in the docs.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import site
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kernelmux_reference
from command import TIMEOUT, clean_environment
from fake_backend import CPU, plan_for
from kernelmux.conformance import jobs
from kernelmux.conformance.hookup import all_cases
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.contract.registry import Registry
from kernelmux.errors import PolicyError
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.graph import Builder, Graph
from kernelmux.graph.ops import OPS
from kernelmux.graph.ops.cases import extremes
from kernelmux.plan.check import check_policy
from kernelmux.plan.lock import read_lock, write_lock
from kernelmux.plan.plan import Plan
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import load_random
from kernelmux.run.walker import Walker

HERE = Path(__file__).parents[1]
DOCS = HERE.parent / "docs"
GOLDEN = json.loads((HERE / "data" / "smollm2_greedy.json").read_text("utf-8"))["cases"][0]
EIGHT = ("mul_mat", "rms_norm", "add", "rope", "attention", "copy", "mul", "silu")
OWN = ("softcap", "mul_mat_softcap")
TERNARY = "acme_ternary"
TOKENS = 8
POLICY = f"""\
[[rule]]
op = {json.dumps(EIGHT)}
use = ["acme"]
on_unsupported = "next"

[defaults]
use = ["torch", "reference"]
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Runs the Python of a new environment, which sees what this one has installed beside what is its own."""
    home = tmp_path / "venv"
    # Where this environment has a pip, the new one may use it: making another takes seconds.
    lacks_pip = importlib.util.find_spec("pip") is None
    subprocess.run([sys.executable, "-m", "venv", *([] if lacks_pip else ["--without-pip"]), home], check=True)
    own = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(home), "platbase": str(home)}))
    seen = dict.fromkeys([*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))])
    # As site directories, so that what is installed editable here is found too.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in seen]
    (own / "outer.pth").write_text("".join(lines))
    binary = home / Path(sysconfig.get_path("scripts", "venv", vars={"base": ""}).lstrip("/\\")) / "python"
    env = clean_environment({"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"})

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(binary), *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)

    return run


@pytest.mark.model
@pytest.mark.slow
def test_a_third_partys_backend_comes_runs_and_goes(python: Run, smollm2: Path, tmp_path: Path):
    def kernelmux(*arguments: object) -> subprocess.CompletedProcess[str]:
        return python("-c", "from kernelmux.cli import main; main()", *arguments)

    def answer(*arguments: object) -> Any:
        result = kernelmux(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def backends() -> dict[str, Any]:
        return {row["name"]: row for row in answer("backends")["backends"]}

    (tmp_path / "p.toml").write_text(POLICY)
    chosen = (smollm2, "--policy", tmp_path / "p.toml")

    # It is installed, and listed.
    # A copy: a build leaves files behind.
    folder = shutil.copytree(HERE / "third_party" / "kernelmux-acme", tmp_path / "kernelmux-acme")
    installed = python("-m", "pip", "install", "--no-deps", "--no-build-isolation", folder)
    assert installed.returncode == 0, installed.stderr
    acme = backends()["acme"]
    assert (acme["version"], acme["fault"]) == ("0.3.1", "")
    assert set(acme["ops"]) == {*EIGHT, *OWN}
    page = python(DOCS / "ops.py", "softcap")
    assert "y = cap * tanh(x / cap)" in page.stdout, page.stderr

    # The policy chooses it, other backends look up the ids, and the answer is the recorded one.
    document = answer("run", *chosen, "-p", GOLDEN["prompt"], "--max-tokens", TOKENS)
    assert document["ids"] == GOLDEN["greedy"][:TOKENS]
    backend_of = {op: {name.partition(":")[0] for name in names} for op, names in document["kernels"].items()}
    assert backend_of == {**{op: {"acme"} for op in EIGHT}, "embed": {"torch"}}

    # Gone, it is missed by name at every node that it would have had, and the plan goes on without it.
    removed = python("-m", "pip", "uninstall", "--yes", "kernelmux-acme")
    assert removed.returncode == 0, removed.stderr
    after = answer("plan", *chosen)
    assert after["fingerprint"] != document["fingerprint"]
    for node in after["nodes"]:
        assert not node["kernel"].startswith("acme")
        missed = [(loser["reason"], loser["kind"]) for loser in node["rejected"] if loser["kernel"] == "acme"]
        wanted = [("not installed: pip install kernelmux-acme", "missing dependency")]
        assert missed == (wanted if node["op"] in EIGHT else [])

    # Without `next`, a policy that needs it is no policy any more.
    (tmp_path / "p.toml").write_text(POLICY.replace('on_unsupported = "next"\n', ""))
    refused = kernelmux("plan", *chosen)
    assert refused.returncode == 2
    line = next(number for number, text in enumerate(POLICY.splitlines(), 1) if text.startswith("use"))
    assert f"{tmp_path / 'p.toml'}:{line}: unknown backend 'acme'" in refused.stderr


# What it brings, beside the reference backend, which serves every op.


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.syspath_prepend(HERE / "third_party" / "kernelmux-acme")
    acme = importlib.import_module("kernelmux_acme")
    with registry.isolated(acme=acme, reference=kernelmux_reference) as both:
        assert both.working == ("acme", "reference")
        yield both


def capped(weight: str = TERNARY) -> Graph:
    """y = softcap(x Wᵀ): n0+n1 is a place for the fused op."""
    b = Builder("capped")
    scores = b.value("mul_mat", "n0", b.leaf("x", ("m", 64), role="state"), weight=(b.leaf("w", (8, 64), weight),))
    return b.build(b.value("softcap", "n1", scores, cap=0.5))


def kernels(plan: Plan) -> dict[str, str]:
    return {step.node.name: step.choice.name for step in plan.schedule(1, 1).steps}


@pytest.mark.parametrize("backend", ["acme", pytest.param("reference", marks=pytest.mark.slow)])
def test_the_suite_runs_its_ops_and_its_format(found: Registry, backend: str):
    passed: Counter[tuple[str, str]] = Counter()
    names = set()
    for job in jobs(backend, found):
        if job.case.op in OWN or TERNARY in job.name:
            outcome = job.run(found)
            assert outcome.status in ("pass", "refused"), (job.name, job.kernel, outcome.failures)
            passed[job.case.op, job.kernel] += outcome.passed
            names.add(job.name)
    wanted = {("softcap", "f32"), ("mul_mat_softcap", "f32"), ("mul_mat", "ternary" if backend == "acme" else "f64")}
    assert {(op, f"{backend}:{kernel}") for op, kernel in wanted} <= set(passed)
    assert min(passed.values()) > 0
    for label in extremes():
        assert {f"softcap-{label}", f"mul_mat_softcap-{label}", f"mul_mat-{TERNARY}-{label}"} <= names


@pytest.mark.usefixtures("found")
def test_cores_ops_have_cases_in_its_format():
    ops = Counter(case.op for case in all_cases() for w in case.fields.get("weight", ())[:1] if w.format == TERNARY)
    assert set(ops) >= {"mul_mat", "embed", "qkv", "mul_mat_add", "gate_up_swiglu", "mul_mat_softcap"}
    assert ops["mul_mat"] >= 25
    assert lookup(TERNARY).nbytes((4, 64)) == 4 * (16 + 2 * 2)


def test_a_plan_fuses_its_op_and_runs_it(found: Registry):
    graph = capped()
    plan = plan_for(graph, found, '[[rule]]\nop = "mul_mat_softcap"\nuse = "acme"\n')
    assert kernels(plan) == {"n0+n1": "acme:f32"}
    assert kernels(plan_for(graph, found, 'fuse = false\n[defaults]\nuse = "acme"\n')) == {
        "n0": "acme:ternary",
        "n1": "acme:f32",
    }
    planes = lookup(TERNARY).draw((8, 64), torch.Generator().manual_seed(0))
    weight, x = Weight("w", (8, 64), TERNARY, planes), torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    walk = Walker(plan, PackedWeights({"w": weight}, CPU), {"x": x.clone()}).bind(m=3)
    walk()
    torch.testing.assert_close(walk.outputs["n1"], 0.5 * torch.tanh(x @ weight.dequantize().T / 0.5))


def test_a_random_model_is_stored_in_its_format(found: Registry):
    model = load_random(f"tiny:{TERNARY}")
    plan = model.plan(use=["mul_mat=acme", "*=acme,reference"])
    products = [step for step in plan.schedule(1, 1).steps if step.node.op == "mul_mat" and step.node.layer is not None]
    assert len(products) == 2 * 7
    assert {step.choice.name for step in products} == {"acme:ternary"}
    assert 0.2 < float(model.forward([1, 2, 3], plan).std()) < 5


def test_its_fields_stand_in_a_graphs_json_and_in_a_lock(found: Registry, tmp_path: Path):
    graph = capped()
    assert Graph.from_json(graph.to_json()) == graph
    plan = plan_for(graph, found, '[defaults]\nuse = "acme"\n')
    write_lock(plan, tmp_path / "p.json")
    again = read_lock(tmp_path / "p.json", graph, found, CPU)
    assert (again.fingerprint, kernels(again)) == (plan.fingerprint, kernels(plan))


RULES = {
    "its op": ('op = "softcap"', "n1"),
    "its fused op": ('op = "mul_mat_softcap"', "n0+n1"),
    "its format": (f'op = "mul_mat"\nweight = "{TERNARY}"', "n0"),
    "what its hook is told": ('op = "softcap"\nwhere = { cap = 0.5 }', "n1"),
}


@pytest.mark.parametrize(("rule", "node"), RULES.values(), ids=RULES)
def test_a_policy_speaks_of_it_at_once(found: Registry, rule: str, node: str):
    fused = "fuse = false\n" if "+" not in node else ""
    text = f'{fused}[[rule]]\n{rule}\nuse = "reference:f64"\n\n[defaults]\nuse = "acme"\n'
    assert kernels(plan_for(capped(), found, text))[node] == "reference:f64"
    assert check_policy(parse_policy(text, "p.toml"), found, CPU, capped()) == []
    unknown = text.replace("softcap", "softcup").replace(TERNARY, "acme_tertiary")
    with pytest.raises(PolicyError, match=r"unknown (op|format) '\w+' \(did you mean"):
        parse_policy(unknown, "p.toml")


def test_an_option_speaks_of_it_too(found: Registry):
    policy = 'fuse = false\n[defaults]\nuse = "acme"\n'
    plan = plan_for(capped(), found, policy, use=["softcap=reference:f64", "mul_mat=acme:f32"])
    assert kernels(plan) == {"n0": "acme:f32", "n1": "reference:f64"}


@pytest.mark.usefixtures("found")
def test_the_page_of_ops_describes_it():
    page = runpy.run_path(str(DOCS / "ops.py"))["described"](OWN)
    assert page.startswith("## softcap\n\n    y = cap * tanh(x / cap).\n")
    assert "- Node fields: cap.\n- Hook: `dispatch_softcap(node, m, n, cap, device)`." in page
    assert "- Equals: mul_mat -> softcap." in page


@pytest.mark.usefixtures("found")
def test_gone_it_leaves_neither_ops_nor_format():
    assert set(OWN) <= set(OPS)
    with registry.isolated(reference=kernelmux_reference):
        assert not set(OWN) & set(OPS)
        assert TERNARY not in {value.format for case in all_cases() for value in case.fields.get("weight", ())}
        with pytest.raises(PolicyError, match="unknown op 'softcap'"):
            parse_policy('[[rule]]\nop = "softcap"\nuse = "acme"\n', "p.toml")
