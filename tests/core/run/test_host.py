"""What a program around has set for torch, and a fork of it: answers are the same, or one line says why not."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import kernelmux
from command import TIMEOUT, clean_environment


@pytest.fixture(scope="module")
def expected(tiny):
    model = kernelmux.load(tiny)
    return model.forward([1, 2, 3]), "".join(model.generate("hello", max_tokens=4))


def defaults(**settings):
    """A context with torch's defaults set otherwise."""

    class Set:
        def __enter__(self):
            torch.set_default_device(settings.get("device"))
            torch.set_default_dtype(settings.get("dtype", torch.float32))

        def __exit__(self, *_):
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)

    return Set()


AROUND = {
    "default device": lambda: defaults(device="meta"),
    "device": lambda: torch.device("meta"),
    "bf16": lambda: defaults(dtype=torch.bfloat16),
    "f64": lambda: defaults(dtype=torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_the_program_around_has_set_changes_nothing_and_stays_set(tiny, expected, around):
    with around():
        before = torch.get_default_device(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
        model = kernelmux.load(tiny)
        logits = model.forward([1, 2, 3])
        pieces = []
        for piece in model.generate("hello", max_tokens=4):
            assert (torch.get_default_device(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == before
            pieces.append(piece)
        assert len(list(model.generate("hello", max_tokens=4, temperature=1.0))) > 0
        assert (torch.get_default_device(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == before
    assert torch.equal(logits, expected[0])
    assert "".join(pieces) == expected[1]


def test_a_session_made_in_inference_mode_goes_on_after_it(tiny, expected):
    model = kernelmux.load(tiny)
    with torch.inference_mode():
        session = model.session(model.plan(), 8)
    assert torch.equal(session.feed(session.open(), [1, 2, 3], all_logits=True), expected[0])


FORK = """
    import os, signal, sys, torch, kernelmux, kernelmux.errors
    model = kernelmux.load(sys.argv[1])
    torch.set_num_threads(2)
    first = list(model.generate("hello", max_tokens=4))
    if os.fork() == 0:
        signal.alarm(120)
        if sys.argv[2] == "one thread":
            torch.set_num_threads(1)
        try:
            assert list(model.generate("hello", max_tokens=4)) == first
            print("the same", flush=True)
        except kernelmux.errors.KernelmuxError as error:
            print(error, flush=True)
        os._exit(0)
    print(os.wait()[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("threads", "said"), [("as many", "this process was forked"), ("one thread", "the same")])
def test_a_fork_after_a_run_says_so_or_works(tiny, threads, said):
    """It hung: torch waits for threads that a fork does not have."""
    command = [sys.executable, "-c", textwrap.dedent(FORK), str(tiny), threads]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=clean_environment(), check=True)
    child, status = ran.stdout.splitlines()
    assert (said in child, status) == (True, "0")
    assert ("spawn" in child) == (threads == "as many")
