"""A plan of another model, file or device runs nowhere: not in `generate`, not in `forward`, not in a session."""

import pytest
from gguf import GGMLQuantizationType

import kernelmux
from kernelmux.contract.device import described_device, find_device
from kernelmux.errors import PlanError
from tiny_model import write_tiny_llama

WAYS = {
    "generate": lambda model, plan: list(model.generate("hello", plan, max_tokens=2)),
    "forward": lambda model, plan: model.forward([1, 2], plan),
    "session": lambda model, plan: model.session(plan, 16),
}
OTHERS = {
    "a wider model": {"hidden": 128},
    "another file of the same model": {"weight_type": GGMLQuantizationType.Q8_0},
    "other settings": {"extra": {"llama.rope.freq_base": 5e5}},
    "a deeper model": {"layers": 3},
}


def classes():
    """Of processors, but for this one."""
    here = find_device("cpu").device_class
    return [words for words in ("cpu avx2", "cpu avx512", "cpu avx512_bf16", "cpu amx") if words != here]


@pytest.fixture(scope="module")
def model(tiny):
    return kernelmux.load(tiny)


@pytest.fixture(scope="module", params=OTHERS.values(), ids=OTHERS)
def other(request, tmp_path_factory):
    return kernelmux.load(write_tiny_llama(tmp_path_factory.mktemp("other") / "other.gguf", **request.param))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_of_another_model_or_file(model, other, way):
    with pytest.raises(PlanError, match=r"^the plan is for tiny \(graph \w+\), the model is tiny \(graph \w+\): make"):
        way(other, model.plan())


@pytest.mark.parametrize("words", [*classes(), "cuda sm_75 Tesla T4"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_of_another_device(model, words, way):
    with pytest.raises(PlanError) as caught:
        way(model, model.plan(device=described_device(words)))
    kind = words.partition(" ")[0]
    if kind == "cpu":
        here = find_device("cpu").device_class
        assert str(caught.value) == f"the plan is for {words}, cpu here is {here}: make one with device='cpu'"
    else:
        assert "device 'cuda:0' was asked for" in str(caught.value) or "the plan is for cuda sm_75" in str(caught.value)


@pytest.mark.slow
def test_one_of_this_kind_of_processor_in_other_words_is_none_of_another(model):
    here = find_device("cpu").device_class
    for device in ("cpu", described_device("cpu"), described_device(here), described_device(f"{here}, 64 processors")):
        assert model.forward([1, 2], model.plan(device=device)).shape == (2, 269)
