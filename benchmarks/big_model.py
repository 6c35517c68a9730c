"""How much memory a model of 1.1 billion weights takes to compress, none of which it could hold at once.

Makes a random-weight checkpoint of TinyLlama's shape (2.2 GB of bfloat16 in several files, a small tokenizer),
compresses it in a process of its own, and compares that process's peak of resident memory with that of an interpreter
which has only imported torch, transformers and tersor. Interrupted, it continues: the checkpoint and finished blocks
are kept.

    python benchmarks/big_model.py --work FOLDER [--max-memory 1.5GB] [--workers N] [--blocks 22] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SHARD = 500_000_000
"""Bytes of weights in one file."""


def make_model(folder: Path, blocks: int) -> None:
    """A Llama of random weights, sharded; one tensor in memory at a time besides the shard being filled."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    shapes = {"model.embed_tokens.weight": (32000, 2048)}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (2048,),
            f"{prefix}self_attn.q_proj.weight": (2048, 2048),
            f"{prefix}self_attn.k_proj.weight": (256, 2048),
            f"{prefix}self_attn.v_proj.weight": (256, 2048),
            f"{prefix}self_attn.o_proj.weight": (2048, 2048),
            f"{prefix}post_attention_layernorm.weight": (2048,),
            f"{prefix}mlp.gate_proj.weight": (5632, 2048),
            f"{prefix}mlp.up_proj.weight": (5632, 2048),
            f"{prefix}mlp.down_proj.weight": (2048, 5632),
        }
    shapes |= {"model.norm.weight": (2048,), "lm_head.weight": (32000, 2048)}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    files: dict[str, int] = {}
    for name, shape in shapes.items():
        tensor = torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape, generator=generator)
        if held + 2 * tensor.numel() > SHARD:
            _save(folder, len(shards), shards[-1])
            shards[-1] = {}
            shards.append({})
            held = 0
        shards[-1][name] = tensor.to(torch.bfloat16)
        held += 2 * tensor.numel()
        files[name] = len(shards)
    _save(folder, len(shards), shards[-1])
    weight_map = {name: f"model-{number:05d}.safetensors" for name, number in files.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    names = ["<unk>", "<s>", "</s>", *LETTERS]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    config.save_pretrained(folder)  # last: with it the folder is complete


def _save(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})


def make_text(path: Path) -> None:
    draw = random.Random(0)
    path.write_text(" ".join("".join(draw.choices(LETTERS, k=draw.randint(2, 9))) for _ in range(40_000)))


def watched(command: list[str], log: Path) -> dict[str, Any]:
    """Run a command; its output, its peak of resident memory, and samples (seconds, anonymous, file-backed bytes).

    The peak is the one that Linux keeps since the program began: what is told of finished children counts this
    process's own memory too, of which they are copies for a moment.
    """
    samples: list[tuple[float, int, int]] = []
    peak = 0
    began = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        while process.poll() is None:
            status = _status(process.pid)
            if status:
                samples.append((time.perf_counter() - began, status["RssAnon"], status["RssFile"]))
                peak = max(peak, status["VmHWM"]) if len(samples) > 1 else 0
            time.sleep(0.1)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return {"output": output, "peak": peak, "samples": samples, "seconds": time.perf_counter() - began}


def _status(pid: int) -> dict[str, int]:
    """Memory of a process in bytes, as Linux tells it; empty when the process has just gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = {
        key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return found if "RssAnon" in found else {}


def by_stage(
    samples: list[tuple[float, int, int]], stages: dict[str, float], baseline: int
) -> dict[str, dict[str, float]]:
    """Peak of each stage above the baseline. Stages end with the process, so they are laid out from its end."""
    end = samples[-1][0] if samples else 0.0
    start = end - sum(stages.values())
    found = {}
    for name, seconds in stages.items():
        inside = [anon + file - baseline for at, anon, file in samples if start <= at <= start + seconds]
        found[name] = {"seconds": round(seconds, 1), "peak_mb": round(max(inside, default=0) / 1e6)}
        start += seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where to keep the checkpoint and the artifact (3 GB)")
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--size", default="25%")
    parser.add_argument("--max-memory", default="1.5GB")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "big_model.json")
    options = parser.parse_args()
    model, text = options.work / f"random-{options.blocks}", options.work / "text.txt"
    artifact = options.work / f"random-{options.blocks}-out"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        make_model(model, options.blocks)
    make_text(text)
    shutil.rmtree(artifact, ignore_errors=True)

    log = options.work / "errors.txt"
    imports = "import torch, transformers, tersor, tersor.api, tersor.show"
    baseline = watched([sys.executable, "-c", imports], log)["peak"]
    command = [
        sys.executable,
        "-m",
        "tersor",
        "compress",
        str(model),
        "--output",
        str(artifact),
        "--size",
        options.size,
    ]
    command += ["--text", str(text), "--sequences", str(options.sequences), "--length", str(options.length)]
    command += [
        "--eval-sequences",
        "4",
        "--max-memory",
        options.max_memory,
        "--workers",
        str(options.workers),
        "--json",
    ]
    run = watched(command, log)
    answer = json.loads(run["output"])
    above = run["peak"] - baseline
    result = {
        "weights": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "artifact": answer["file_bytes"],
        "budget": answer["budget"],
        "blocks": options.blocks,
        "workers": options.workers,
        "max_memory": options.max_memory,
        "calibration": f"{options.sequences} x {options.length} tokens",
        "baseline_peak_bytes": baseline,
        "peak_bytes": run["peak"],
        "peak_above_baseline_bytes": above,
        "seconds": round(run["seconds"], 1),
        "stages": by_stage(run["samples"], answer["stages"], baseline),
        "kl": answer["quality"]["kl"],
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    rows = [
        (name, f"{stage['seconds']:.1f} s", f"{stage['peak_mb']:.0f} MB") for name, stage in result["stages"].items()
    ]
    for row in [("stage", "time", "peak above baseline"), *rows]:
        sys.stdout.write(f"{row[0]:12} {row[1]:>10} {row[2]:>22}\n")
    sys.stdout.write(
        f"peak {above / 1e6:.0f} MB above the {baseline / 1e6:.0f} MB of imports; {run['seconds']:.0f} s\n"
    )


if __name__ == "__main__":
    main()
