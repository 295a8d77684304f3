"""Folders: shards, names, ties and templates; what is wrong with one is told in one line."""

import json
import shutil
import struct

import pytest
import torch

import kernelmux
from command import call_command
from folders import write_tokenizer
from kernelmux.errors import ModelError

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LAYER = {
    "input_layernorm": (32,),
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "post_attention_layernorm": (32,),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
SHAPES = {"model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,)}
SHAPES |= {f"model.layers.0.{module}.weight": shape for module, shape in LAYER.items()}


def save(path, shapes):
    """A safetensors file of seeded noise in bfloat16."""
    table, data = {}, b""
    for index, (name, shape) in enumerate(shapes.items()):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * shape[-1] ** -0.5
        raw = values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny-llama"
    path.mkdir()
    save(path / "model.safetensors", SHAPES)
    (path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    return path


def configure(folder, **changes):
    said = {key: value for key, value in {**CONFIG, **changes}.items() if value != "leave out"}
    (folder / "config.json").write_text(json.dumps(said), "utf-8")


def refused(folder, message):
    with pytest.raises(ModelError, match=message) as caught:
        kernelmux.load(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def logits(folder):
    model = kernelmux.load(folder)
    return model.forward([1, 2, 3], model.plan(use=["*=reference"]))


def test_a_folder_answers_ids_and_says_what_it_is(folder):
    model = kernelmux.load(folder)
    assert model.graph.name == "tiny-llama"
    assert (model.source.shape.layers, model.source.shape.context, model.source.shape.vocab) == (1, 64, 40)
    assert model.graph.values["blk.0.attn_q.weight"].format == "bf16"
    assert logits(folder).isfinite().all()
    with pytest.raises(ModelError, match=r"tokenizer.json: no such file, so that prompts are token ids"):
        model.encode("hello")


def test_a_folder_without_a_tokenizer_answers_ids_with_ids_up_to_the_end_that_it_states(folder):
    model = kernelmux.load(folder)
    plan = model.plan(use=["*=reference"])
    answer = model.generate([1, 2, 3], plan, max_tokens=8)
    assert "".join(answer) == " ".join(map(str, answer.ids))
    assert len(answer.ids) == 8
    told = call_command("run", folder, "--ids", "1,2,3", "--max-tokens", 8, "--use", "*=reference")
    assert (told.code, told.out) == (0, " ".join(map(str, answer.ids)) + "\n")
    end = answer.ids[3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}), "utf-8")
    before = answer.ids[: answer.ids.index(end)]
    ended = kernelmux.load(folder).generate([1, 2, 3], plan, max_tokens=8)
    assert "".join(ended) == " ".join(map(str, before))
    assert ended.ids == [*before, end]


@pytest.mark.parametrize("rows", [1000, 40])
def test_a_folder_answers_text_with_its_own_tokenizer_and_template(folder, rows):
    write_tokenizer(folder, "byte level", chat_template="<|im_start|>{{ messages[0].content }}{{ eos_token }}")
    save(folder / "model.safetensors", SHAPES | {"model.embed_tokens.weight": (rows, 32)})
    configure(folder, vocab_size=rows)
    model = kernelmux.load(folder)
    messages = [{"role": "user", "content": "a</s>"}]
    if rows < model.source.tokenizer.vocab_size:
        with pytest.raises(ModelError, match=r"token id 90\d is not in the vocabulary of 40"):
            model.encode(messages)
        return
    ids = model.encode(messages)
    assert model.source.tokenizer.decode(ids) == "<|im_start|>a</s></s>"
    assert ids.count(model.source.tokenizer.eos_id) == 1
    answer = model.generate(messages, model.plan(use=["*=reference"]), max_tokens=8)
    assert "".join(answer) == model.source.tokenizer.decode(answer.ids)
    assert model.source.tokenizer.token_bytes(999) == b""


def test_biases_are_those_that_the_config_states(folder):
    whole = logits(folder)
    configure(folder, attention_bias=False, mlp_bias=False)
    assert logits(folder).equal(whole)
    configure(folder, attention_bias=True)
    refused(folder, "attention_bias is true, and tensor 'blk.0.attn_q.bias' is missing")
    save(folder / "model.safetensors", SHAPES | {"model.layers.0.mlp.down_proj.bias": (32,)})
    configure(folder, mlp_bias=False)
    refused(folder, "mlp_bias is false, and tensor 'blk.0.ffn_down.bias' is there")
    configure(folder, mlp_bias=True)
    assert not logits(folder).equal(whole)


def test_a_key_of_biases_that_its_model_type_does_not_heed_is_none(folder):
    configure(folder, model_type="mistral", attention_bias=True)
    assert logits(folder).isfinite().all()


def test_shards_are_one_model(folder):
    whole = logits(folder)
    first, second = list(SHAPES.items())[:4], list(SHAPES.items())[4:]
    generators = dict(enumerate(SHAPES))
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    for number, names in ((1, first), (2, second)):
        part = folder / f"model-0000{number}-of-00002.safetensors"
        _cut(folder / "all.safetensors", part, [name for name, _ in names])
    (folder / "all.safetensors").unlink()
    where = {name: f"model-0000{1 if index < 4 else 2}-of-00002.safetensors" for index, name in generators.items()}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}), "utf-8")
    assert logits(folder).equal(whole)
    index.write_text(json.dumps({"weight_map": {**where, "model.norm.weight": "../other.safetensors"}}), "utf-8")
    refused(folder, "file '../other.safetensors' is not in the folder")
    index.write_text(json.dumps({"weight_map": {**where, "lm_head.weight": where["model.norm.weight"]}}), "utf-8")
    refused(folder, "tensor 'lm_head.weight' is not in 'model-00001-of-00002.safetensors', where the index says it is")
    first_file = where.pop("model.norm.weight")
    index.write_text(json.dumps({"weight_map": where}), "utf-8")
    refused(folder, "tensor 'model.norm.weight' lies in model-00001-of-00002.safetensors, the index does not have it")
    index.write_text(json.dumps({"weight_map": {**where, "model.norm.weight": first_file}}), "utf-8")
    index.rename(folder / "kept")
    refused(folder, "neither model.safetensors nor model.safetensors.index.json, which says what lies in files such as")
    (folder / "kept").rename(index)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors: no such file")


def _cut(source, target, names):
    """A file with some of another's tensors."""
    content = source.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    table, kept, data = json.loads(content[8 : 8 + length]), {}, b""
    for name in names:
        first, last = (offset + 8 + length for offset in table[name]["data_offsets"])
        kept[name] = {**table[name], "data_offsets": [len(data), len(data) + last - first]}
        data += content[first:last]
    header = json.dumps(kept).encode()
    target.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_the_head_is_tied_as_the_configuration_says(folder):
    tied = logits(folder)
    save(folder / "model.safetensors", {**SHAPES, "lm_head.weight": (40, 32)})
    assert logits(folder).equal(tied)
    configure(folder, tie_word_embeddings=False)
    assert not logits(folder).equal(tied)
    save(folder / "model.safetensors", SHAPES)
    refused(folder, "tensor 'lm_head.weight' is missing, and tie_word_embeddings is false")


def test_frequencies_that_older_folders_store_are_left_out(folder):
    save(folder / "model.safetensors", {**SHAPES, "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    assert logits(folder).isfinite().all()


def test_a_tensor_that_no_module_has_is_refused_by_its_own_name(folder):
    save(folder / "model.safetensors", {**SHAPES, "model.layers.0.self_attn.sinks": (4,)})
    refused(folder, "tensor 'model.layers.0.self_attn.sinks': llama models are not built with it")


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_is_the_folders(folder, where):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / where).write_text(
        template if where.endswith("jinja") else json.dumps({"chat_template": template}), "utf-8"
    )
    assert kernelmux.load(folder).source.file.metadata["tokenizer.chat_template"] == template


CONFIGS = {
    "model_type": ("lama", r"config.json: model_type 'lama' is not built in \(did you mean 'llama'\?\); known: "),
    "hidden_act": ("gelu", "hidden_act = 'gelu': only silu is built in"),
    "num_hidden_layers": ("1", "num_hidden_layers = '1': a count from 1 on is needed"),
    "hidden_size": (True, "hidden_size = True: a count from 1 on is needed"),
    "vocab_size": ("leave out", "lacks llama.vocab_size, which a llama model must state"),
    "rope_theta": ("1e4", "rope parameter rope_theta = '1e4': a positive number is needed"),
    "rope_scaling": ({"type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not built in.*known: default, lin"),
    "rope_parameters": ([1], r"rope_parameters = \[1\]: an object is needed"),
    "tie_word_embeddings": ("yes", "tie_word_embeddings = 'yes': true or false is needed"),
    "layer_types": (["full_attention"] * 2, "one kind for each of 1 layers is needed"),
    "quantization_config": (
        {"bits": 4},
        "quantization_config.quant_method = None: it is not built in; known: awq,",
    ),
    "num_local_experts": (8, "num_local_experts = 8: it is not built in, and would be ignored"),
    "clip_qkv": (8.0, "clip_qkv = 8.0: only None is built in"),
}


@pytest.mark.parametrize(("key", "value", "message"), [(key, *rest) for key, rest in CONFIGS.items()], ids=CONFIGS)
def test_what_the_configuration_asks_for_and_is_not_built_in_is_refused(folder, key, value, message):
    configure(folder, **{key: value})
    refused(folder, message)


NONSENSE = [True, -1, 0, 0.5, 2**40, "", "x", [], [1], [[]], {}, {"a": 1}, ["full_attention"], {"rope_type": []}]
ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MORE = {"sliding_window": 4, "max_window_layers": 0, "layer_types": None, "rope_parameters": ROPE, "head_dim": 8}


@pytest.mark.parametrize("key", [*CONFIG, *MORE, "use_sliding_window", "rope_scaling", "partial_rotary_factor"])
def test_a_value_of_any_type_is_a_model_or_one_line(folder, key):
    for value in NONSENSE:
        configure(folder, **{**MORE, key: value})
        opens_or_refuses(folder)


@pytest.mark.parametrize(
    "key", [*ROPE, "type", "beta_fast", "attention_factor", "mscale", "partial_rotary_factor", "x"]
)
def test_so_is_a_parameter_of_the_rotation(folder, key):
    for value in NONSENSE:
        configure(folder, rope_parameters={**ROPE, "mscale_all_dim": 1.0, key: value})
        opens_or_refuses(folder)


def opens_or_refuses(folder):
    try:
        kernelmux.load(folder)
    except ModelError as error:
        if "\n" in str(error):
            raise


def test_a_parameter_of_another_kind_of_rotation_is_refused(folder):
    configure(folder, rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 16.0})
    refused(folder, "rope parameter 'beta_fast' = 16.0: linear is not built with it; it would be ignored")


def test_older_and_newer_words_for_the_rotation_are_one(folder):
    stated = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}
    configure(folder, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **stated})
    older = kernelmux.load(folder)
    newer = {"rope_type": "llama3", "rope_theta": 5e5, **stated}
    configure(folder, rope_theta="leave out", rope_parameters=newer)
    assert kernelmux.load(folder).graph == older.graph
    divisors = older.source.file.weights["rope_freqs.weight"].dequantize()
    assert (float(divisors[0]), float(divisors[-1])) == (1.0, 8.0)


def test_what_is_no_model_is_told(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors: no such file")
    shutil.rmtree(folder)
    folder.mkdir()
    refused(folder, "a folder without config.json; name a .gguf file, or a model's folder")
    for content, message in (("", "is empty"), ("[]", "is JSON, but of a list"), ("{", "is not JSON")):
        (folder / "config.json").write_text(content, "utf-8")
        refused(folder, f"config.json: {message}")
