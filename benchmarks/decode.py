"""Tokens a second of one text at a time: tersor's packed models beside llama.cpp, torch and torchao, taking turns.

Two models: SmolLM2-135M (a folder, compressed here without calibration, as only speed is measured), and a Llama of
1.1 billion random weights, which is filled in memory with random codes and written as a GGUF file of random blocks:
what weights are makes no difference to how fast they are read. ``int4:g32`` holds the same bits as llama.cpp's Q4_0.

Every turn runs all of them once, so that ratios are of neighbours; what is reported is the median over turns, whose
places in memory are not the same. Memory is
the peak of a process that loads an artifact and writes text, above one that has imported torch: the first time, when
all has to be found out about it, and after that.

    python benchmarks/decode.py --model FOLDER [--tools FOLDER] [--tokens 64] [--turns 11] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from peers import llama_cpp
from product_speed import random_parts
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tersor
from engines import bench_program
from tersor.api import compress_for
from tersor.codecs import parse
from tersor.runtime import large_pages
from tersor.runtime.decoding import Decoder
from tersor.runtime.decoding.sampling import likeliest
from tersor.runtime.packed import Packed, adopt
from tersor.stages.session import Style, open_session

CONTEXT = 256
BIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
PAUSE = 3.0
"""Seconds before a turn. A virtual machine gives memory that was let go back to its host some two seconds later, and
whoever runs just then is a tenth slower."""
Contestant = Callable[[], float]
"""Runs once and gives tokens a second."""


def packed_model(config: LlamaConfig, text: str) -> Any:
    """A model of random codes in every matrix, embeddings and head included."""
    codec = parse(text)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rotary = type(model.model.rotary_emb)(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            adopt(module, codec)
    for number, module in enumerate(model.modules()):
        if isinstance(module, Packed):
            for name, part in random_parts(codec, module.stored_shape, number).items():
                module._buffers[name] = part
        elif "RMSNorm" in type(module).__name__:
            module.weight = torch.nn.Parameter(torch.ones(config.hidden_size), requires_grad=False)
    model.model.rotary_emb = rotary
    return model.eval()


def random_gguf(path: Path, config: LlamaConfig) -> None:
    """The same shape as a GGUF file of random Q4_0 blocks, without a vocabulary."""
    width, heads, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    inner, vocabulary = config.intermediate_size, config.vocab_size
    part = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    draw = numpy.random.default_rng(0)
    shapes = {"token_embd.weight": (vocabulary, width), "output.weight": (vocabulary, width)}
    for block in range(config.num_hidden_layers):
        narrow = keys * (width // heads)
        named = {"attn_q": (width, width), "attn_k": (narrow, width), "attn_v": (narrow, width)}
        named |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
        shapes |= {
            f"blk.{block}.{name}.weight": shape for name, shape in (named | {"ffn_down": (width, inner)}).items()
        }
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", numpy.ones(width, dtype=numpy.float32))
    writer.add_tensor("output_norm.weight", numpy.ones(width, dtype=numpy.float32))
    for name, (rows, columns) in shapes.items():
        blocks = draw.integers(0, 256, (rows, columns // 32, 18), dtype=numpy.uint8)
        blocks[:, :, :2] = numpy.frombuffer(numpy.float16(0.01).tobytes(), dtype=numpy.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def by_decoder(model: Any, tokens: int, *, int8: bool = False, cache_dtype: torch.dtype = torch.float16) -> Contestant:
    """tersor's compiled step, greedy, with large pages and a cache of float16, as `tersor run` has it.

    Weights are put somewhere else in memory for each turn, as llama.cpp's are: where they lie can make a tenth of
    difference.
    """

    def run() -> float:
        large_pages.move(model.modules())
        decoder = Decoder.of(model, context=CONTEXT, cache_dtype=cache_dtype, int8=int8)
        time.sleep(PAUSE)
        token = likeliest(decoder.feed([1, 2, 3, 4]))
        began = time.perf_counter()
        for _ in range(tokens):
            token = likeliest(decoder.feed([token]))
        return tokens / (time.perf_counter() - began)

    return run


def by_transformers(model: Any, tokens: int) -> Contestant:
    """transformers' own loop, greedy, without a stop."""
    ids = torch.tensor([[1, 2, 3, 4]])

    def run() -> float:
        with torch.no_grad():
            time.sleep(PAUSE)
            cache = model(ids, use_cache=True)
            token = cache.logits[:, -1:].argmax(2)
            past = cache.past_key_values
            began = time.perf_counter()
            for _ in range(tokens):
                found = model(token, past_key_values=past, use_cache=True)
                past, token = found.past_key_values, found.logits[:, -1:].argmax(2)
        return tokens / (time.perf_counter() - began)

    return run


def by_llama_cpp(program: Path, path: Path, tokens: int) -> Contestant:
    """llama.cpp's benchmark of itself."""

    def run() -> float:
        command = [str(program), "-m", str(path), "-p", "0", "-n", str(tokens), "-r", "1", "-o", "json", "-ngl", "0"]
        command += ["-t", str(torch.get_num_threads())]
        time.sleep(PAUSE)
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(json.loads(answer)[0]["avg_ts"])

    return run


def torchao_model(model: Any, work: Path) -> Any:
    """The model's linear layers in torchao's int8, weights alone; torchao is fetched when it is not there."""
    folder = work / "torchao"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "torchao"]
        subprocess.run(pip, check=True)
    sys.path.append(str(folder))
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def measure(contestants: dict[str, Contestant], turns: int) -> dict[str, Any]:
    """Tokens a second of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, run in contestants.items():
            found[name].append(run())
    return {name: {"median": statistics.median(values), "all": values} for name, values in found.items()}


def ratio(result: dict[str, Any], one: str, other: str) -> float:
    """The median ratio of neighbours."""
    return statistics.median(a / b for a, b in zip(result[one]["all"], result[other]["all"], strict=True))


PROMPTS = (
    "What is a tensor?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue.",
    "List three uses of copper.",
    "How do I sort a list in Python?",
    "Who was Ada Lovelace?",
    "Translate 'good morning' into French.",
    "What is 17 times 3?",
    "Describe a cat to someone who has never seen one.",
    "Give me a recipe for pancakes.",
)


def agreement(artifact: Path, tokens: int = 128) -> dict[str, Any]:
    """How often the compiled step's greedy token is the likeliest of the decoded weights in float32 by transformers.

    Both are given the same text so far; where they differ, ``behind`` is how far the step's token is from the
    likeliest, in standard deviations of the logits.
    """
    session = open_session(artifact, trust_remote_code=False)
    session.prepare(CONTEXT, torch.float16)
    assert session.decoder is not None, session.fallback
    written = []
    for prompt in PROMPTS:
        ids = session.encode(prompt)
        session.write(ids, tokens=tokens, style=Style())
        written.append((len(ids), list(session.remembered)))
    session.decoder = None
    model = session.model.dequantize()
    same, behind = 0, []
    for given, ids in written:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, given - 1 : -1].float()
        chosen = torch.tensor(ids[given:])
        best = logits.max(1)
        same += int((best.indices == chosen).sum())
        short = (best.values - logits.gather(1, chosen[:, None])[:, 0]) / logits.std(1)
        behind += [float(value) for value in short[best.indices != chosen]]
    return {"tokens": sum(len(ids) - given for given, ids in written), "same": same, "behind": behind}


def small(given: argparse.Namespace, program: Path) -> dict[str, Any]:
    """SmolLM2-135M at 4 bits."""
    packed, plain = given.work / "int4", given.work / "q4_0.gguf"
    source = str(given.model)
    if not packed.exists():
        plan = tersor.plan(source, size="99%", candidates=("int4:g32",), fast=True)
        tersor.compress(source, packed, plan=plan.plan, solver="nearest")
    if not plain.exists():
        plan = tersor.plan(source, size="99%", candidates=("q4_0",), fast=True, engine="llama.cpp")
        compress_for("llama.cpp", source, plain, plan=plan.plan, solver="nearest")
    load = AutoModelForCausalLM.from_pretrained
    contestants = {"tersor int4:g32": by_decoder(load(packed, dtype=torch.float32).eval(), given.tokens)}
    contestants["the same, inputs of 8 bits"] = by_decoder(
        load(packed, dtype=torch.float32).eval(), given.tokens, int8=True
    )
    for artifact in given.artifact:
        model = load(artifact, dtype=torch.float32).eval()
        contestants[f"tersor {artifact.name}"] = by_decoder(model, given.tokens)
    contestants["llama.cpp Q4_0"] = by_llama_cpp(program, plain, given.tokens)
    contestants["transformers, packed int4:g32"] = by_transformers(load(packed).eval(), given.tokens // 2)
    contestants["transformers bf16"] = by_transformers(
        load(given.model, dtype=torch.bfloat16).eval(), given.tokens // 2
    )
    dynamic = load(given.model, dtype=torch.float32).eval()
    dynamic = torch.ao.quantization.quantize_dynamic(dynamic, {torch.nn.Linear}, dtype=torch.qint8)
    contestants["torch int8, dynamic"] = by_transformers(dynamic, given.tokens // 2)
    weights = torchao_model(load(given.model, dtype=torch.bfloat16).eval(), given.work)
    contestants["torchao int8, weights alone"] = by_transformers(weights, given.tokens // 2)
    result = measure(contestants, given.turns)
    result["ratios"] = {
        "llama.cpp Q4_0": ratio(result, "tersor int4:g32", "llama.cpp Q4_0"),
        "transformers bf16": ratio(result, "tersor int4:g32", "transformers bf16"),
    }
    result["memory"] = memory(packed, given.tokens)
    result["agreement"] = {artifact.name: agreement(artifact) for artifact in (packed, *given.artifact)}
    return result


def big(given: argparse.Namespace, program: Path) -> dict[str, Any]:
    """1.1 billion random weights, at 4 and 2 bits."""
    path = given.work / "big-q4_0.gguf"
    if not path.exists():
        random_gguf(path, BIG)
    contestants = {"llama.cpp Q4_0": by_llama_cpp(program, path, given.tokens)}
    for text in given.codecs.split(","):
        # Keys of random weights are too large for float16, which the proof of the step finds out.
        model = packed_model(BIG, text)
        contestants[f"tersor {text}"] = by_decoder(model, given.tokens, cache_dtype=torch.float32)
    result = measure(contestants, given.turns)
    first = f"tersor {given.codecs.split(',')[0]}"
    result["ratios"] = {name: ratio(result, name, "llama.cpp Q4_0") for name in contestants if name != "llama.cpp Q4_0"}
    result["ratios to 4 bits"] = {name: ratio(result, name, first) for name in contestants if name.startswith("tersor")}
    return result


_PEAK = """
import sys, torch
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
from tersor.stages.session import Style, open_session
from pathlib import Path
session = open_session(Path(sys.argv[1]), trust_remote_code=False)
imported_and_loaded = peak()
session.prepare(256, torch.float16)
assert session.decoder is not None, session.fallback
session.write(session.encode("What is a tensor?"), tokens=int(sys.argv[2]), style=Style())
session.keep()
print(before, imported_and_loaded, peak())
"""


def memory(artifact: Path, tokens: int) -> dict[str, int]:
    """Bytes that are resident at most, in a process of its own."""
    peaks = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "XDG_CACHE_HOME": cache}
        command = [sys.executable, "-c", _PEAK, str(artifact), str(tokens)]
        for _ in range(2):
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            peaks.append([int(word) for word in answer.split()[-3:]])
    torch_alone, loaded, peak = peaks[1]
    stored = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    return {
        "torch_alone": torch_alone,
        "loaded": loaded,
        "peak": peak,
        "weights_file": stored,
        "above_torch_and_weights": peak - torch_alone - stored,
        "above_them_the_first_time": peaks[0][2] - peaks[0][0] - stored,
    }


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show(name: str, result: dict[str, Any]) -> None:
    print(name)
    for contestant, found in result.items():
        if isinstance(found, dict) and "median" in found:
            print(f"  {contestant:32} {found['median']:8.1f} tokens/s")
        elif isinstance(found, dict):
            print(f"  {contestant}: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="more artifacts of it to run")
    parser.add_argument("--tools", type=Path, default=Path("out/tools"), help="where llama.cpp is, or is put")
    parser.add_argument("--work", type=Path, default=Path("out/decode"))
    parser.add_argument("--codecs", default="int4:g32,int2:g64,trellis2:L12,trellis2:L8")
    parser.add_argument("--only", choices=("small", "big"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    program = bench_program(llama_cpp(given.tools))
    results: dict[str, Any] = {}
    with threads(given.threads):
        results["threads"] = torch.get_num_threads()
        for name, run in (("small", small), ("big", big)):
            if given.only in (None, name):
                results[name] = run(given, program)
                show(name, results[name])
                gc.collect()
    if given.only is None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
