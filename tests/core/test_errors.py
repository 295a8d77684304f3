"""Errors: one tree to catch, what each is about, where it was raised, and the nearest spelling of an unknown name."""

import importlib
import json
import pickle
import sys

import pytest
import torch

import kernelmux
from kernelmux import errors
from kernelmux.contract.answers import checked_classes
from kernelmux.errors import BackendError, KernelmuxError, LaunchError, PolicyError, nearest, told, where_raised


@pytest.mark.parametrize("stage", ["Model", "Graph", "Policy", "Plan", "Backend", "Launch"])
def test_every_error_can_be_caught_as_one(stage):
    assert issubclass(getattr(errors, f"{stage}Error"), KernelmuxError)


def test_the_error_to_catch_is_the_packages_own_name():
    assert kernelmux.KernelmuxError is KernelmuxError


def test_nearest_suggests_the_close_name_and_lists_all():
    assert nearest("rms_nrom", ["add", "rms_norm"]) == " (did you mean 'rms_norm'?); known: add, rms_norm"


def test_nearest_suggests_a_name_in_its_own_case():
    assert "did you mean 'Q4_K'" in nearest("q4k", ["f32", "Q4_K"])


def test_nearest_knows_a_name_whose_parts_are_turned_around():
    assert "did you mean 'mul_mat'" in nearest("matmul", ["mat", "mul", "mul_mat"])


def test_nearest_only_lists_where_nothing_is_close():
    assert nearest("zzzz", ["b", "a"]) == "; known: a, b"


def test_nearest_says_where_nothing_exists():
    assert nearest("torch", []) == "; known: none"


def test_nearest_is_the_same_in_any_order():
    names = ["torch:int4", "torch:int8", "torch:f32"]
    assert nearest("torch:in4", names) == nearest("torch:in4", reversed(names))


@pytest.mark.parametrize(
    "error",
    [
        PolicyError("kernels.toml:3: unknown key", file="kernels.toml", line=3),
        LaunchError("it raised", "blk.0.attn_q", "torch:f32", sticky=True, device="cuda:0", step=4),
    ],
)
def test_an_error_survives_another_process_with_what_it_is_about(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_an_error_is_about_nothing_that_it_was_not_told():
    error = KernelmuxError("something")
    assert (error.file, error.line, error.node, error.kernel, error.backend) == (None,) * 5


def test_an_error_about_a_kernel_is_about_its_backend():
    assert LaunchError("it raised", "n1", "cupy:dp4a").backend == "cupy"
    assert BackendError("it raised", kernel="cupy:dp4a").backend == "cupy"
    assert BackendError("it is broken", backend="cupy").kernel is None


def raised_by(function, *arguments):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*arguments)
    return caught.value


def backend(tmp_path, source, name="somebody"):
    """A backend's module, imported from a file of its own."""
    (tmp_path / f"{name}.py").write_text(source)
    sys.path.insert(0, str(tmp_path))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop(name, None)


def through_core(kernel):
    """A call of core's that calls a backend's code, which raises."""
    namespace = {"__name__": "kernelmux.run.walk"}
    exec(compile("def call(function):\n    return function()", "walk.py", "exec"), namespace)
    return namespace["call"](kernel)


def test_the_line_of_an_error_is_the_backends(tmp_path):
    theirs = backend(tmp_path, "def inner():\n    raise ValueError\n\ndef kernel():\n    inner()\n")
    assert where_raised(raised_by(through_core, theirs.kernel)) == "somebody.py:2"


@pytest.mark.parametrize(
    "call",
    ["torch.zeros(2).view(3, 5)", "torch.nn.Linear(2, 3)(torch.zeros(5))", "json.loads('{')", "np.zeros(2).reshape(3)"],
)
def test_the_line_of_an_error_is_not_that_of_a_library_that_the_backend_calls(tmp_path, call):
    theirs = backend(tmp_path, f"import json, torch\nimport numpy as np\n\ndef kernel():\n    {call}\n")
    assert where_raised(raised_by(through_core, theirs.kernel)) == "somebody.py:5"


def test_a_place_begins_at_the_outermost_package(tmp_path, monkeypatch):
    folder = tmp_path / "kernelmux_elsewhere" / "fast"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "kernels.py").write_text("def kernel():\n    raise ValueError\n")
    (folder / "broken.py").write_text("x = 1\ndef kernel(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    kernels = importlib.import_module("kernelmux_elsewhere.fast.kernels")
    assert where_raised(raised_by(through_core, kernels.kernel)) == "kernelmux_elsewhere/fast/kernels.py:2"
    error = raised_by(importlib.import_module, "kernelmux_elsewhere.fast.broken")
    assert where_raised(error) == "kernelmux_elsewhere/fast/broken.py:2"
    for module in ("kernelmux_elsewhere", "kernelmux_elsewhere.fast", "kernelmux_elsewhere.fast.kernels"):
        monkeypatch.delitem(sys.modules, module)


def test_the_line_of_an_error_is_not_that_of_core_which_the_backend_calls(tmp_path):
    source = """from kernelmux.contract.answers import checked_classes

def kernel():
    checked_classes("f", None)
"""
    assert where_raised(raised_by(through_core, backend(tmp_path, source).kernel)) == "somebody.py:4"


def test_the_line_of_an_error_of_no_backend_is_the_innermost():
    assert where_raised(raised_by(through_core, lambda: json.loads("{"))).startswith("test_errors.py:")
    assert where_raised(raised_by(checked_classes, "f", None)).startswith("kernelmux/contract/answers.py:")
    assert where_raised(raised_by(through_core, torch.nn.Linear(2, 3).forward)).startswith("walk.py:")


def test_an_error_that_was_never_raised_has_no_line():
    assert where_raised(ValueError()) == "an unknown line"


def test_the_line_of_a_syntax_error_is_that_of_the_text(tmp_path):
    error = raised_by(through_core, lambda: backend(tmp_path, "x = 1\ndef kernel(:\n"))
    assert where_raised(error) == "somebody.py:2"


def test_an_exception_whose_words_raise_is_told_all_the_same():
    class OddError(Exception):
        def __str__(self):
            raise OSError("no words")

    assert told(OddError()) == "(OSError where its words are made)"
    assert told(ValueError("words")) == "words"
