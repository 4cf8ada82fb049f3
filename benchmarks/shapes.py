"""Named weights of well-known models, as (out_features, in_features)."""

from __future__ import annotations

# https://huggingface.co/openai-community/gpt2/blob/main/config.json: d = 768, 4 d = 3072
# https://huggingface.co/meta-llama/Meta-Llama-3-8B: d = 4096, intermediate 14336
# https://huggingface.co/meta-llama/Meta-Llama-3-70B: d = 8192
SHAPES = {
    "gpt2 attn.c_proj": (768, 768),
    "gpt2 mlp.c_fc": (3072, 768),
    "llama3-8b q_proj": (4096, 4096),
    "llama3-8b gate_proj": (14336, 4096),
    "llama3-8b down_proj": (4096, 14336),
    "llama3-70b q_proj": (8192, 8192),
}

CPU_SHAPES = ("gpt2 attn.c_proj", "gpt2 mlp.c_fc")
CUDA_SHAPES = (
    "llama3-8b q_proj",
    "llama3-8b gate_proj",
    "llama3-8b down_proj",
    "llama3-70b q_proj",
)
