"""A backend of somebody else's: installed with pip, chosen by a policy, run on the real model, uninstalled again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import TIMEOUT, clean_environment

pytestmark = [pytest.mark.model, pytest.mark.slow]

HERE = Path(__file__).parents[1]
GOLDEN = json.loads((HERE / "data" / "smollm2_greedy.json").read_text("utf-8"))["cases"][0]
OPS = ("mul_mat", "rms_norm", "add", "rope", "attention", "copy", "mul", "silu")
TOKENS = 8
POLICY = f"""\
[[rule]]
op = {json.dumps(OPS)}
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
    assert set(acme["ops"]) == set(OPS)

    # The policy chooses it, other backends look up the ids, and the answer is the recorded one.
    document = answer("run", *chosen, "-p", GOLDEN["prompt"], "--max-tokens", TOKENS)
    assert document["ids"] == GOLDEN["greedy"][:TOKENS]
    backend_of = {op: {name.partition(":")[0] for name in names} for op, names in document["kernels"].items()}
    assert backend_of == {**{op: {"acme"} for op in OPS}, "embed": {"torch"}}

    # Gone, it is missed by name at every node that it would have had, and the plan goes on without it.
    removed = python("-m", "pip", "uninstall", "--yes", "kernelmux-acme")
    assert removed.returncode == 0, removed.stderr
    after = answer("plan", *chosen)
    assert after["fingerprint"] != document["fingerprint"]
    for node in after["nodes"]:
        assert not node["kernel"].startswith("acme")
        missed = [(loser["reason"], loser["kind"]) for loser in node["rejected"] if loser["kernel"] == "acme"]
        wanted = [("not installed: pip install kernelmux-acme", "missing dependency")]
        assert missed == (wanted if node["op"] in OPS else [])

    # Without `next`, a policy that needs it is no policy any more.
    (tmp_path / "p.toml").write_text(POLICY.replace('on_unsupported = "next"\n', ""))
    refused = kernelmux("plan", *chosen)
    assert refused.returncode == 2
    assert f"rule 1 ({tmp_path / 'p.toml'}:1): unknown backend 'acme'" in refused.stderr
