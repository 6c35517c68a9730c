"""Artifact folders written by hand: tiny random models, each layer rounded to nearest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tersor.codecs import parse
from tersor.contracts import LeafCodec
from tersor.engines.transformers import register
from tersor.solvers import Nearest

TINY = {
    "llama": transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=48, n_layer=2, n_head=4),
    "gemma2": transformers.Gemma2Config(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    "mixtral": transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "gpt_oss": transformers.GptOssConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "falcon": transformers.FalconConfig(
        vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
}


@dataclass
class Folder:
    """A hand-written artifact, and the plain model whose weights are what the artifact decodes to."""

    path: Path
    plain: transformers.PreTrainedModel
    layers: dict[str, str]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def rewrite(self) -> None:
        """Write config.json and the weights anew, after a test has changed ``layers`` or ``tensors``."""
        self.plain.config.save_pretrained(self.path)
        config = json.loads((self.path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "tersor", "format": 1, "layers": self.layers}
        (self.path / "config.json").write_text(json.dumps(config))
        save_file(self.tensors, self.path / "model.safetensors", metadata={"format": "pt"})

    def edit_config(self, change: Callable[[dict], None]) -> None:
        config = json.loads((self.path / "config.json").read_text())
        change(config["quantization_config"])
        (self.path / "config.json").write_text(json.dumps(config))


def encode(weight: torch.Tensor, text: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Stored tensors of ``weight (out, in)``, and what they decode to."""
    codec = parse(text)
    shape = (weight.shape[0], weight.shape[1])
    if text.startswith("rows("):
        tensors = {
            stretch.prefix + name: tensor
            for stretch in codec.stretches(shape[0])
            for name, tensor in encode(weight[stretch.start : stretch.stop], str(stretch.codec))[0].items()
        }
    elif isinstance(codec, LeafCodec):
        tensors = codec.pack(Nearest().solve(weight, codec, None), shape)
    else:
        tensors = codec.encode(weight)
    return tensors, codec.decode(tensors, shape)


def layer_weights(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """``{layer name: (parameter, stored (in, out))}`` of everything that can be packed."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            found[name] = (f"{name}.weight", isinstance(module, Conv1D))
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                found[f"{name}.{own}"] = (f"{name}.{own}", bool(getattr(module, "is_transposed", False)))
    return found


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Folder]:
    """``make_folder(kind, codec, ...)``: ``codec`` is one text, or a function of the layer name (None: keep it)."""

    def make(
        kind: str, codec: str | Callable[[str], str | None] = "int4:row", dtype: torch.dtype = torch.float32
    ) -> Folder:
        torch.manual_seed(0)
        config = type(TINY[kind]).from_dict(TINY[kind].to_dict())
        config.dtype = dtype
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
            else:
                parameter.data *= 5
        config = model.config
        config.architectures, config.dtype = [type(model).__name__], dtype
        state = model.state_dict()
        tied = set(model.all_tied_weights_keys)
        layers, tensors = {}, {}
        for name, (parameter, turned) in layer_weights(model).items():
            text = codec if isinstance(codec, str) else codec(name)
            if parameter in tied or text is None:
                continue
            weight = state[parameter]
            stacked = weight.transpose(-1, -2) if turned else weight
            stored, decoded = encode(stacked.reshape(-1, stacked.shape[-1]).contiguous(), text)
            decoded = decoded.view(stacked.shape)
            weight.copy_(decoded.transpose(-1, -2) if turned else decoded)
            layers[name] = text
            tensors.update({f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()})
        packed = {layer_weights(model)[name][0] for name in layers}
        for name, tensor in state.items():
            if name not in packed and name not in tied:
                tensors[name] = tensor.to(dtype)
                tensor.copy_(tensors[name])
        folder = Folder(tmp_path / kind, model.to(dtype), layers, tensors)
        folder.path.mkdir()
        folder.rewrite()
        return folder

    register()
    return make
