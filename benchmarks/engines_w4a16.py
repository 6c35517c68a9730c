"""W4A16 for vLLM: tersor's codes next to llm-compressor's GPTQ, the same scheme, calibration text and model.

Both write a compressed-tensors folder with every linear layer of the blocks in symmetric 4-bit integers of one group
size, embedding and head as they are. Both folders are then read and measured in float32 by one evaluator on the same
held-out windows; ours is run by transformers too. llm-compressor runs in an environment of its own, as ``peers.py``
installs it, and stores float32 scales, ours are bfloat16.

    python benchmarks/engines_w4a16.py --model MODEL --text TEXT --python ENV/bin/python [--groups 64,32] [--blocks 2]

``--blocks`` cuts the model after so many blocks, for a short trial. What is done is kept in the work folder. Groups
that do not divide a layer's width are reported as such: vLLM cannot have them there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tersor import api, pipeline
from tersor.anatomy import analyse, open_source, skeleton
from tersor.codecs import parse
from tersor.contracts import Anatomy, Choice, Plan
from tersor.engines.compressed_tensors.rules import refuses

HERE = Path(__file__).parent
ENGINE = "compressed-tensors"


def cut(model: Path, blocks: int, folder: Path) -> Path:
    """The model's first ``blocks`` blocks as a model of their own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        short = AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=blocks, dtype=torch.bfloat16)
        short.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def split_text(text: Path, work: Path) -> tuple[Path, Path]:
    """The text in two files: nine tenths to calibrate with, the rest held out."""
    words = text.read_text(encoding="utf-8")
    at = words.rfind("\n", 0, len(words) * 9 // 10) + 1 or len(words) * 9 // 10
    made = work / "calibration.txt", work / "held-out.txt"
    for path, part in zip(made, (words[:at], words[at:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return made


def uniform(anatomy: Anatomy, text: str) -> Plan:
    """Every layer that can have it in ``text``, the rest in bf16. Raises ValueError where the group does not divide."""
    layers = {}
    for layer in anatomy.layers:
        quantized = layer.kind == "linear" and layer.block is not None
        why = refuses(anatomy, layer, parse(text), 1) if quantized else None
        if why is not None:
            raise ValueError(f"{layer.name}: {why}")
        layers[layer.name] = Choice(text if quantized else "bf16", 0, 0.0)
    return Plan(layers, 1 << 60, 0, 0.0)


class Bench:
    """What both sides share: the model, the texts, and where results are kept."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.work: Path = given.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.model = (
            cut(given.model, given.blocks, self.work / f"model-{given.blocks}") if given.blocks else given.model
        )
        self.calibration, self.held_out = split_text(given.text, self.work)
        self.settings: dict[str, Any] = {
            "text": str(self.calibration),
            "eval_text": str(self.held_out),
            "sequences": given.sequences,
            "length": given.length,
            "eval_sequences": given.eval_sequences,
            "workers": given.workers,
        }

    def ours(self, group: int) -> dict[str, Any]:
        """A folder by tersor, and what the engine computes with it."""
        source = open_source(self.model)
        plan = uniform(analyse(source, skeleton(source)), f"sint4:g{group}:bf16")
        output = self.work / f"tersor-g{group}"
        began = time.process_time()
        done = api.compress_for(ENGINE, self.model, output, plan=plan, overwrite=True, samples=0, **self.settings)
        cpu = time.process_time() - began  # all stages
        assert done.proof is not None
        stages = dict(done.result.stages)
        # The other side neither verifies nor measures. Where processors are shared, CPU time says more than this.
        seconds = sum(stages.get(name, 0.0) for name in ("open", "text", "statistics", "plan", "encode"))
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "stages": stages,
            "bytes": done.proof.file_bytes,
            "quality": self.quality(output),
            "proof": {**asdict(done.proof), "path": str(output)},
        }

    def theirs(self, group: int) -> dict[str, Any]:
        """A folder by llm-compressor's GPTQ, likewise."""
        folder = self.work / f"llmcompressor-g{group}"
        if not (folder / "result.json").exists():
            settings = {"bits": 4, "group": group, "sequences": self.given.sequences, "length": self.given.length}
            command = [str(self.given.python), str(HERE / "peers" / "llm_compressor.py")]
            command += ["--model", str(Path(self.model).resolve()), "--text", str(self.calibration.resolve())]
            command += ["--out", str(folder.resolve()), "--settings", json.dumps(settings)]
            threads = {"OMP_NUM_THREADS": str(self.given.workers), "HF_HUB_OFFLINE": "1"}
            subprocess.run([*command, "--threads", str(self.given.workers)], check=True, env={**os.environ, **threads})
        result = json.loads((folder / "result.json").read_text())
        return {
            "seconds": result["seconds"],
            "cpu_seconds": result["cpu_seconds"],
            "version": result["version"],
            "bytes": result["file_bytes"],
            "quality": self.quality(folder / "files"),
        }

    def quality(self, folder: Path) -> dict[str, Any]:
        """Of a folder's weights, in float32 on the held-out text."""
        given = self.given
        return asdict(
            api.evaluate(
                folder,
                against=self.model,
                text=str(self.held_out),
                sequences=given.eval_sequences,
                length=given.length,
                dtype="float32",
                workers=given.workers,
            )
        )

    def row(self, group: int) -> dict[str, Any]:
        """Both sides at one group size."""
        kept = self.work / f"row-g{group}.json"
        if kept.exists():
            return dict(json.loads(kept.read_text()))
        try:
            ours = self.ours(group)
        except ValueError as error:
            return {"group": group, "error": str(error)}
        found = {"group": group, "ours": ours, "theirs": self.theirs(group)}
        kl = [found[side]["quality"]["kl"] for side in ("ours", "theirs")]
        found |= {"kl_ratio": kl[0] / kl[1], "time_ratio": ours["seconds"] / found["theirs"]["seconds"]}
        kept.write_text(json.dumps(found, indent=1) + "\n")
        return found


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"g{row['group']}: {row['error']}"
    sides = [
        f"{side} KL {row[side]['quality']['kl']:.5f} in {row[side]['seconds']:.0f} s "
        f"(CPU {row[side]['cpu_seconds']:.0f} s), {row[side]['bytes']:,} bytes"
        for side in ("ours", "theirs")
    ]
    return f"g{row['group']}: {'; '.join(sides)}; KL x {row['kl_ratio']:.3f}, time x {row['time_ratio']:.2f}"


def main() -> None:
    """Read the command line and measure all group sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="interpreter with llmcompressor")
    parser.add_argument("--groups", default="128,64,32")
    parser.add_argument("--blocks", type=int, default=0, help="of the model, from the first; 0 for all")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--eval-sequences", type=int, default=16)
    parser.add_argument("--workers", type=int, default=pipeline.available_workers())
    parser.add_argument("--work", type=Path, default=Path("out/engines-w4a16"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    bench = Bench(given)
    began = time.time()
    rows = []
    for group in (int(word) for word in given.groups.split(",")):
        rows.append(bench.row(group))
        print(show(rows[-1]), flush=True)
    if given.out is not None:
        settings = {name: str(value) for name, value in vars(given).items()}
        head = {
            "settings": settings,
            "machine": platform.processor() or platform.machine(),
            "seconds": time.time() - began,
        }
        given.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
