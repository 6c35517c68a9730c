"""A GGUF file of a tiny Llama with its tokenizer, for tests. Needs the package ``gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import tiny_tokenizer

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_UNKNOWN, _CONTROL, _NORMAL = 2, 3, 1


def write(path: Path) -> Path:
    """Two blocks of width 64, float32, a token a character."""
    import gguf

    model = tiny_models.build("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=96)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_name(name.removesuffix(".weight")) + ".weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any) -> None:
    tokens = ["<unk>", "<s>", "</s>", *tiny_tokenizer.LETTERS.replace(" ", "\u2581")]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([_UNKNOWN, _CONTROL, _CONTROL] + [_NORMAL] * (len(tokens) - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _name(parameter: str) -> str:
    """A module's name as llama.cpp calls it."""
    if parameter in _NAMES:
        return _NAMES[parameter]
    _, _, block, name = parameter.split(".", 3)
    return f"blk.{block}.{_NAMES[name]}"
