"""llama.cpp: its converter, importance matrix and quantizer. Settings: type, imatrix, length, sequences.

The GGUF file is read back with the ``gguf`` package. Rows of queries and keys are put back in the source's order.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from common import Job, main
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of the linear layers of a model of the Llama family."""


def quantize(job: Job) -> None:
    """``settings["home"]`` is the folder of llama.cpp's source, with its programs in ``build/bin``."""
    home = Path(job.settings["home"])
    programs = home / "build" / "bin"
    plain = job.out.parent / "llama_cpp_source.gguf"
    if not plain.exists():
        convert = [sys.executable, str(home / "convert_hf_to_gguf.py"), str(_named(job)), "--outtype", "bf16"]
        subprocess.run([*convert, "--outfile", str(plain)], check=True)
    command = [str(programs / "llama-quantize")]
    with job.timed():
        if job.settings["imatrix"]:
            matrix = job.out.parent / f"llama_cpp_imatrix_{hashlib.sha256(job.text.read_bytes()).hexdigest()[:8]}.gguf"
            if not matrix.exists():
                _importance(job, programs, plain, matrix)
            command += ["--imatrix", str(matrix)]
        target = job.files / "model.gguf"
        subprocess.run([*command, str(plain), str(target), job.settings["type"], str(job.threads)], check=True)
    tensors, bits, types = _read(job, target)
    job.notes.append("linears: " + ", ".join(f"{kind} {share:.0%}" for kind, share in types))
    revision = job.settings["version"]
    job.finish(f"llama.cpp ({revision})", tensors, bits)


def _named(job: Job) -> Path:
    """The model's folder, or one like it where its configuration does not name its class, which the converter needs."""
    config = json.loads((job.model / "config.json").read_text())
    if config.get("architectures"):
        return job.model
    folder = job.out / "source"
    folder.mkdir(exist_ok=True)
    for path in job.model.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").unlink()
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    return folder


def _importance(job: Job, programs: Path, plain: Path, matrix: Path) -> None:
    """Mean squares of the inputs of every layer on the calibration text."""
    settings = job.settings
    command = [str(programs / "llama-imatrix"), "-m", str(plain), "-f", str(job.text), "-o", str(matrix)]
    command += ["-c", str(settings["length"]), "--chunks", str(settings["sequences"]), "-t", str(job.threads)]
    subprocess.run([*command, "-ngl", "0", "--no-ppl"], check=True)


def _read(job: Job, path: Path) -> tuple[dict[str, Tensor], float, list[tuple[str, float]]]:
    """The file's tensors by the source's names, bits per weight on the linears, and the shares of their types."""
    config = json.loads((job.model / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, Tensor] = {}
    nbytes = weights = 0
    types: Counter[str] = Counter()
    for entry in GGUFReader(path).tensors:
        value = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        if entry.name == "token_embd.weight":
            tensors["model.embed_tokens.weight"] = value
            job.notes.append(f"embedding {entry.tensor_type.name}")
        words = entry.name.split(".")
        if words[0] == "blk" and words[2] in PARTS:
            if words[2] in heads:
                value = _unpermuted(value, heads[words[2]])
            tensors[f"model.layers.{words[1]}.{PARTS[words[2]]}.weight"] = value
            nbytes += entry.n_bytes
            weights += value.numel()
            types[entry.tensor_type.name] += value.numel()
    return tensors, 8 * nbytes / weights, [(kind, count / weights) for kind, count in types.most_common()]


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order of the source: the converter interleaves the halves of every head for its rotary embedding."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    main(quantize)
