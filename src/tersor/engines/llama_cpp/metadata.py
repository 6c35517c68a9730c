"""What a GGUF says of a model besides its tensors: sizes, attention, positions, experts, vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tersor.engines.llama_cpp.names import architecture
from tersor.engines.llama_cpp.tokenizer import Vocabulary
from tersor.errors import BadInput

_VERSION = 2
"""Of GGML's quantization formats; the same since 2023."""


def describe(writer: Any, config: PretrainedConfig, *, name: str, file_type: int) -> None:
    """Everything about the network, put into a ``gguf.GGUFWriter``. Raises BadInput for what llama.cpp cannot do."""
    arch = architecture(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(_VERSION)
    writer.add_file_type(file_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    _positions(writer, config, arch, head)
    _extras(writer, config, arch)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """The position settings that most layers use, whichever way this version of transformers keeps them."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "full_attention" in found:
        found = found["full_attention"]
    found = dict(found)
    found.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def _positions(writer: Any, config: PretrainedConfig, arch: str, head: int) -> None:
    rope = _rope(config)
    share = float(rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0) or 1.0))
    writer.add_rope_dimension_count(int(head * share))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_string(f"{arch}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(int(trained))
    elif kind == "longrope":
        trained = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(trained)
        ratio = config.max_position_embeddings / trained
        factor = rope.get("attention_factor") or rope.get("factor")
        writer.add_rope_scaling_attn_factors(
            float(factor or (math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0))
        )
    elif kind not in ("default", "llama3"):
        raise BadInput(f"Positions of type {kind!r} cannot be written for llama.cpp here.")


def extra_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Tensors that llama.cpp reads and transformers computes: the factors of Llama 3's and Phi 3's long positions."""
    if architecture(config) == "gpt2":
        return {}
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(rope["original_max_position_embeddings"])
    smooth = ((trained / waves - low) / (high - low)).clamp(0, 1)
    # Between the two bounds transformers interpolates the frequencies, here their inverse factors.
    return {"rope_freqs.weight": (1 / (smooth + (1 - smooth) / factor)).float()}


def _extras(writer: Any, config: PretrainedConfig, arch: str) -> None:
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if window and used and arch in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(int(window))
    if arch.startswith("gemma"):
        _check_gemma(config, arch)
    if arch == "gemma2":
        for value, put in (
            (config.attn_logit_softcapping, writer.add_attn_logit_softcapping),
            (config.final_logit_softcapping, writer.add_final_logit_softcapping),
        ):
            if value is not None:
                put(float(value))
    if arch == "gemma3":
        local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
        base = local.get("rope_theta", getattr(config, "rope_local_base_freq", None))
        if base is not None:
            writer.add_float32(f"{arch}.rope.freq_base_swa", float(base))
    if arch == "qwen3moe" and not config.norm_topk_prob:
        raise BadInput(
            "This model does not normalise its experts' weights (norm_topk_prob), and llama.cpp's qwen3moe always "
            "does: it cannot be run there."
        )
    if arch.endswith("moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        shared = getattr(config, "shared_expert_intermediate_size", 0)
        if shared:
            writer.add_expert_shared_feed_forward_length(shared)


def _check_gemma(config: PretrainedConfig, arch: str) -> None:
    """llama.cpp has these built in; in a model that differs it would compute something else without a word."""
    largest = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[arch]
    scale = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar != scale:
        raise BadInput(
            f"This model scales attention by 1/sqrt({config.query_pre_attn_scalar}), and llama.cpp's {arch} always by "
            f"1/sqrt({scale}): it cannot be run there."
        )
    every = {"gemma2": 2, "gemma3": 6}[arch]
    wanted = [
        "full_attention" if (k + 1) % every == 0 else "sliding_attention" for k in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != wanted:
        raise BadInput(
            f"In this model other layers attend to the whole text than in llama.cpp's {arch}, where every {every}th "
            f"does: it cannot be run there."
        )


def describe_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """``tokenizer.ggml.*``."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    put: Mapping[str, Any] = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, number in vocabulary.special.items():
        put[name](number)
    if vocabulary.add_bos is not None:
        writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.add_eos is not None:
        writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
