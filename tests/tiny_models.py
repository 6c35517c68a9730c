"""Tiny random models of many families, for tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEADS8 = {**_BASE, "head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_BASE, "num_hidden_layers": 3}),
    "llama-tied": ("LlamaConfig", {**_BASE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _BASE),
    "qwen3": ("Qwen3Config", _HEADS8),
    "mistral": ("MistralConfig", {**_BASE, "sliding_window": 4}),
    "gemma2": ("Gemma2Config", {**_HEADS8, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**_HEADS8, "sliding_window": 4, "_sliding_window_pattern": 2}),
    "phi3": ("Phi3Config", _BASE),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPTConfig", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 24}),
    "neox": ("GPTNeoXConfig", {**_SMALL, "intermediate_size": 48}),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "mixtral": ("MixtralConfig", {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3moe": ("Qwen3MoeConfig", {**_HEADS8, **_MOE, "decoder_sparse_step": 1}),
    "qwen2moe": ("Qwen2MoeConfig", {**_BASE, **_MOE, "shared_expert_intermediate_size": 24}),
    "gptoss": ("GptOssConfig", {**_HEADS8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "deepseek": (
        "DeepseekV3Config",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "olmo2": ("Olmo2Config", _BASE),
    "falcon": ("FalconConfig", {**_SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm": ("StableLmConfig", _BASE),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_HEADS8,
            "vocab_size_per_layer_input": 100,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
}

STREAMED = tuple(name for name in FAMILIES if name != "gemma3n")
"""Families whose blocks can be run one by one. Gemma 3n hands each block a piece of the text."""


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: object) -> Any:
    """A model of the family with random weights, norms and biases included; vocabulary of 100."""
    name, settings = FAMILIES[family]
    chosen = {**settings, **options, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = getattr(transformers, name)(**chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().to(dtype)
