"""Named weights of well-known models, as (out_features, in_features)."""

from __future__ import annotations

# https://huggingface.co/openai-community/gpt2/blob/main/config.json: d = 768, 4 d = 3072
# https://huggingface.co/google/vit-base-patch16-224: d = 768, intermediate 3072
# https://huggingface.co/google/vit-large-patch16-224: d = 1024, intermediate 4096
# https://huggingface.co/meta-llama/Llama-3.2-1B: d = 2048, intermediate 8192, 8 heads of 64 for k
# https://huggingface.co/meta-llama/Meta-Llama-3-8B: d = 4096, intermediate 14336, 8 of 128 for k
# https://huggingface.co/meta-llama/Meta-Llama-3-70B: d = 8192, intermediate 28672, 8 of 128 for k
SHAPES = {
    "gpt2 attn.c_proj": (768, 768),
    "gpt2 attn.c_attn": (2304, 768),
    "gpt2 mlp.c_fc": (3072, 768),
    "gpt2 mlp.c_proj": (768, 3072),
    "vit-b mlp.fc1": (3072, 768),
    "vit-b mlp.fc2": (768, 3072),
    "vit-l attn.qkv": (3072, 1024),
    "vit-l mlp.fc1": (4096, 1024),
    "vit-l mlp.fc2": (1024, 4096),
    "llama3.2-1b q_proj": (2048, 2048),
    "llama3.2-1b k_proj": (512, 2048),
    "llama3.2-1b qkv": (3072, 2048),  # q, k and v as one weight
    "llama3.2-1b gate_proj": (8192, 2048),
    "llama3.2-1b gate_up": (16384, 2048),  # gate and up as one weight
    "llama3.2-1b down_proj": (2048, 8192),
    "llama3-8b q_proj": (4096, 4096),
    "llama3-8b k_proj": (1024, 4096),
    "llama3-8b qkv": (6144, 4096),
    "llama3-8b gate_proj": (14336, 4096),
    "llama3-8b gate_up": (28672, 4096),
    "llama3-8b down_proj": (4096, 14336),
    "llama3-70b q_proj": (8192, 8192),
    "llama3-70b k_proj": (1024, 8192),
    "llama3-70b gate_proj": (28672, 8192),
    "llama3-70b down_proj": (8192, 28672),
}

CPU_SHAPES = ("gpt2 attn.c_proj", "gpt2 mlp.c_fc")
CUDA_SHAPES = (
    "llama3-8b q_proj",
    "llama3-8b gate_proj",
    "llama3-8b down_proj",
    "llama3-70b q_proj",
)
