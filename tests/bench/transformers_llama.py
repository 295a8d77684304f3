"""The peer: transformers' LlamaForCausalLM with random weights, prompts eager, decoding compiled and replayed."""

from __future__ import annotations

import time
from typing import Any

import torch

from kernelmux.contract.device import Device
from kernelmux.measure.timing import Timing
from kernelmux.models.random import Sizes

REPEATS = 5


@torch.no_grad()
def measure(work: str, sizes: Sizes, device: Device, length: int, steps: int) -> Timing:
    """Microseconds of an eager prompt of `length`, or of a compiled step after it."""
    model = transformers_model(sizes, device)
    ids = torch.randint(sizes.vocab, (1, length), device=device.torch)
    if work == "prompt":
        return Timing.of([time_forward(model, ids, device) for _ in range(REPEATS + 2)][2:])
    return time_steps(model, ids, steps, device)


def transformers_model(sizes: Sizes, device: Device) -> Any:
    """A llama of these sizes in bf16, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        max_position_embeddings=sizes.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=sizes.tied,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device.torch):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def synchronize(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize()


def time_forward(model: Any, ids: torch.Tensor, device: Device) -> float:
    """Microseconds of a prompt, with the cache that it leaves and the last row's logits."""
    synchronize(device)
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    synchronize(device)
    return (time.perf_counter() - started) * 1e6


def time_steps(model: Any, ids: torch.Tensor, steps: int, device: Device) -> Timing:
    """Microseconds of a greedy step: the cache static, the forward pass compiled and replayed as a CUDA graph."""
    from transformers import StaticCache

    length = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + steps)
    # The prompt is not compiled: it also makes the cache's tensors, whose addresses the graph keeps.
    token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(dim=-1)
    positions = [torch.tensor([[length + done]], device=ids.device) for done in range(steps)]
    compiled = torch.compile(model.forward, mode="reduce-overhead")
    samples = []
    for _ in range(REPEATS + 2):
        # Back to the prompt's end, in place: what follows is overwritten.
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        synchronize(device)
        started = time.perf_counter()
        for position in positions:
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(token, position_ids=position, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(dim=-1).clone()
        synchronize(device)
        samples.append((time.perf_counter() - started) / steps * 1e6)
    # The first round compiles and captures, the second warms up.
    return Timing.of(samples[2:])
