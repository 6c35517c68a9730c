"""W4A16 for vLLM: tersor's codes next to llm-compressor's GPTQ, the same scheme, calibration windows and model.

Both write a compressed-tensors folder with every linear layer of the blocks in symmetric 4-bit integers of one group
size, embedding and head as they are. Both folders are then read and measured in float32 by one evaluator on the same
held-out windows; ours is run by stock transformers too. Ours twice: with tokens weighted by the loss's gradients, as
is usual, and with all tokens alike (``--sensitivity flat``), which is what the other does. llm-compressor runs in an
environment of its own, as ``peers.py`` installs it, in float32, and stores float32 scales; ours are bfloat16.

Time is that of quantization: of theirs the call of ``oneshot`` with the model loaded and the text tokenized; of ours
everything from opening the model to the last encoded layer, in an artifact on disk. Neither counts imports, what is
written after that, checks and measurements. Seconds of the clock depend on what else the machine does; processor
seconds do so less.

    python benchmarks/engines_w4a16.py --model MODEL --text TEXT [--groups 64,32] [--blocks 2] [--out RESULT.json]

``--blocks`` cuts the model after so many blocks, for a short trial. What is done is kept in the work folder, so a
stopped benchmark continues. Groups that do not divide a layer's width are reported as such: vLLM cannot have them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import Bench, Job

from tersor import api, pipeline
from tersor.anatomy import analyse, open_source, skeleton
from tersor.codecs import parse
from tersor.contracts import Anatomy, Choice, Plan
from tersor.engines.compressed_tensors.rules import refuses
from tersor.stages.encode import STAGE

ENGINE = "compressed-tensors"
WAYS = {"weighted": "fisher", "alike": "flat"}
"""How our tokens count, and the option that says so."""
AIMS = {"kl": 0.85, "cpu": 0.5, "clock": 0.5}
"""What each ratio of ours to theirs should be at most."""


def cut(model: Path, blocks: int, folder: Path) -> Path:
    """The model's first ``blocks`` blocks as a model of their own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        short = AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=blocks, dtype=torch.bfloat16)
        short.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def held_out(text: Path, work: Path) -> Path:
    """The last tenth of the text in a file of its own; calibration takes its windows from the beginning."""
    words = text.read_text(encoding="utf-8")
    at = words.rfind("\n", 0, len(words) * 9 // 10) + 1 or len(words) * 9 // 10
    path = work / "held-out.txt"
    path.write_text(words[at:], encoding="utf-8")
    return path


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


class Until:
    """Time from now until a stage last reported, by the clock and by the processors of this process."""

    def __init__(self, stage: str) -> None:
        self._stage, self._began = stage, (time.perf_counter(), time.process_time())
        self.seconds = self.cpu_seconds = 0.0

    def __call__(self, stage: str, _done: int, _total: int) -> None:
        """As a run's ``progress``."""
        if stage == self._stage:
            self.seconds = time.perf_counter() - self._began[0]
            self.cpu_seconds = time.process_time() - self._began[1]


class Comparison:
    """One model, its texts, and what both sides made of it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.work: Path = given.work
        self.work.mkdir(parents=True, exist_ok=True)
        if given.blocks:
            given.model = cut(given.model, given.blocks, self.work / f"model-{given.blocks}")
        self.model: Path = given.model
        self.peer = Bench(given)
        self.held_out = held_out(given.text, self.work)

    def folder(self, way: str, group: int) -> Path:
        """Where ours lies."""
        return self.work / f"tersor-{way}-g{group}"

    def ours(self, way: str, group: int) -> dict[str, Any]:
        """A folder by tersor, and what transformers computes with it."""
        source = open_source(self.model)
        plan = uniform(analyse(source, skeleton(source)), f"sint4:g{group}:bf16")
        output, given, clock = self.folder(way, group), self.given, Until(STAGE)
        done = api.compress_for(
            ENGINE,
            self.model,
            output,
            plan=plan,
            effort="fast",  # there is nothing to search for: it only says how much of the text gradients are taken of
            sensitivity=WAYS[way],
            overwrite=True,
            restart=True,
            progress=clock,
            text=str(self.peer.calibration),
            eval_text=str(self.held_out),
            sequences=given.sequences,
            length=given.length,
            eval_sequences=given.eval_sequences,
            samples=0,
            workers=given.workers,
        )
        assert done.proof is not None
        return {
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
            "stages": dict(done.result.stages),
            "bytes": done.proof.file_bytes,
            "proof": {**asdict(done.proof), "path": output.name},
        }

    def theirs(self, group: int) -> dict[str, Any]:
        """A folder by llm-compressor's GPTQ. Raises CalledProcessError when that fails."""
        folder = self.peer.quantized(Job("llmcompressor", {"bits": 4, "group": group}))
        (folder / "dequantized.safetensors").unlink(missing_ok=True)  # the folder itself is read
        result = json.loads((folder / "result.json").read_text())
        taken = {name: result[name] for name in ("seconds", "cpu_seconds", "version")}
        return {**taken, "bytes": result["file_bytes"], "folder": str(folder / "files")}

    def quality(self, folder: Path) -> dict[str, Any]:
        """Of a folder's weights, in float32 on the held-out text."""
        given = self.given
        found = api.evaluate(
            folder,
            against=self.model,
            text=str(self.held_out),
            sequences=given.eval_sequences,
            length=given.length,
            dtype="float32",
            workers=given.workers,
        )
        return asdict(found)

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """JSON in the work folder, made once for each calibration text."""
        path = self.work / f"{name}_{self.peer.key}.json"
        if not path.exists():
            made = make()
            path.write_text(json.dumps(made, indent=1) + "\n")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def row(self, group: int) -> dict[str, Any]:
        """Both sides at one group size."""
        try:
            ours = {way: self.kept(f"ours-{way}-g{group}", partial(self.ours, way, group)) for way in WAYS}
        except ValueError as error:
            return {"group": group, "error": str(error)}
        theirs = self.kept(f"theirs-g{group}", partial(self.theirs, group))
        theirs["quality"] = self.judged("theirs", group, Path(theirs.pop("folder")))
        for way, one in ours.items():
            one["quality"] = self.judged(way, group, self.folder(way, group))
            one["ratios"] = {
                "kl": one["quality"]["kl"] / theirs["quality"]["kl"],
                "cpu": one["cpu_seconds"] / theirs["cpu_seconds"],
                "clock": one["seconds"] / theirs["seconds"],
            }
        return {"group": group, "ours": ours, "theirs": theirs}

    def judged(self, side: str, group: int, folder: Path) -> dict[str, Any]:
        """The quality of one side's folder."""
        return self.kept(f"quality-{side}-g{group}-{self.given.eval_sequences}", partial(self.quality, folder))


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# W4A16 in compressed-tensors, next to llm-compressor's GPTQ",
        "",
        f"Model: {result['model']}. Calibration: {result['calibration']}; evaluation: {result['evaluation']}. KL in "
        "nats per token against the source, both folders in float32 by one evaluator. Threads of each side: "
        f"{result['workers']}.",
        "",
        "Time is that of quantization: theirs of `oneshot` alone, model loaded and text tokenized; ours from opening "
        "the model to the last encoded layer on disk. Seconds of the clock are those of a machine that does nothing "
        "else, or they say less than processor seconds.",
        "",
        "| group | by | KL | bytes | processor s | clock s |",
        "|---|---|---|---|---|---|",
    ]
    after = []
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['group']} | {row['error']} | | | | |")
            continue
        sides = {f"tersor, tokens {way}": one for way, one in row["ours"].items()}
        for name, one in {**sides, row["theirs"]["version"]: row["theirs"]}.items():
            quality = one["quality"]
            lines.append(
                f"| {row['group']} | {name} | {quality['kl']:.4f} ± {quality['kl_error']:.4f} | {one['bytes']:,} | "
                f"{one['cpu_seconds']:.0f} | {one['seconds']:.0f} |"
            )
        for way, one in row["ours"].items():
            met = ", ".join(
                f"{name} {one['ratios'][name]:.2f} (aim {aim}{'' if one['ratios'][name] <= aim else ', missed'})"
                for name, aim in AIMS.items()
            )
            proof = one["proof"]
            after += [
                "",
                f"Groups of {row['group']}, tokens {way}, ours divided by theirs: {met}. Stock transformers computes "
                f"our folder with a KL of {proof['engine']['kl']:.4f}; our decoding predicts {proof['ours']['kl']:.4f};"
                f" between the two are {proof['noise']:.1e} nats.",
            ]
    return "\n".join([*lines, *after]) + "\n"


def run(given: argparse.Namespace) -> None:
    """All group sizes, and after each the tables of what there is."""
    name = given.model_name or given.model.name
    comparison = Comparison(given)
    result: dict[str, Any] = {
        "model": name + (f", its first {given.blocks} blocks" if given.blocks else ""),
        "calibration": f"{given.sequences} windows of {given.length} tokens from the beginning of {given.text.name}",
        "evaluation": f"{given.eval_sequences} windows of {given.length} from its last tenth",
        "machine": platform.processor() or platform.machine(),
        "workers": given.workers,
        "rows": [],
    }
    for group in (int(word) for word in given.groups.split(",")):
        result["rows"].append(comparison.row(group))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(markdown(result))
    print(given.out.with_suffix(".md").read_text())


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--model-name", help="what to call it in the results")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--groups", default="64")
    parser.add_argument("--blocks", type=int, default=0, help="of the model, from the first; 0 for all")
    parser.add_argument("--sequences", type=int, default=32, help="calibration windows, for both sides")
    parser.add_argument("--length", type=int, default=512, help="tokens in each of them")
    parser.add_argument("--eval-sequences", type=int, default=8)
    parser.add_argument("--workers", type=int, default=pipeline.available_workers())
    parser.add_argument("--work", type=Path, default=Path("out/engines-w4a16"))
    parser.add_argument("--tools", type=Path, default=Path("out/tools"), help="where llm-compressor is installed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines_w4a16.json"))
    given = parser.parse_args()
    given.chunks, given.window = given.eval_sequences, given.length
    run(given)


if __name__ == "__main__":
    main()
