"""Llama models with random weights, by transformers' own classes, and a greedy decode step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

# Published shapes (config.json of each model on https://huggingface.co/meta-llama). The tokens of a
# random model mean nothing; its weights take the time that the published ones would.
_SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
MODELS = tuple(_SHAPES)


def build(
    name: str, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> LlamaForCausalLM:
    """The model ``name`` with random weights, in eval mode, made on ``device``.

    Args:
        name: one of ``MODELS``.
        device: where it is made.
        dtype: of all its weights.
        layers: number of layers; None takes the published one.
    """
    shape = _SHAPES[name] if layers is None else {**_SHAPES[name], "num_hidden_layers": layers}
    config = LlamaConfig(**shape, max_position_embeddings=8192, use_cache=True)
    with _default_dtype(dtype), device:
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Decoder:
    """Greedy decoding, one token of each sequence at a time, in a static cache.

    The prompt runs eagerly, whatever compiles the model's call later.

    Args:
        model: the model; what compiles its call may come after this.
        ids: the prompts, (batch, tokens); they are in the cache before the first step.
        room: tokens that fit into the cache.
    """

    def __init__(self, model: nn.Module, ids: Tensor, room: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        with torch.no_grad():
            out = model.forward(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)  # (batch, 1)
        self.position = torch.full((1, 1), ids.shape[1], device=ids.device)

    def step(self) -> Tensor:
        """Decode one token of each sequence; its logits, (batch, vocabulary)."""
        with torch.no_grad():
            out = self.model(
                input_ids=self.token,
                position_ids=self.position,
                past_key_values=self.cache,
                use_cache=True,
            )
            logits = out.logits[:, -1]
            self.token = logits.argmax(-1, keepdim=True)
            self.position = self.position + 1
        return logits
