"""Better GGUFs of the same size? llama.cpp's own files and tersor's, both run by llama.cpp, on two reference models.

For each of llama.cpp's own kinds of file (``--kinds``) its quantizer makes one with an importance matrix from the
calibration text, and tersor one of at most the same bytes and the same time a token, by the types that both have, from
the same text (as ``tersor compress --like`` does). llama.cpp then computes logits of both on the same held-out windows,
which are compared with the float32 reference's; and generates from both in turn, for the speed. The second model has
widths that 256 divides, so that K and IQ types apply everywhere: on the first, both sides fall back to other types in
most layers. Its inputs span 576 of their 768 dimensions, and error feedback can put errors into the others, which
llama.cpp's quantizer cannot: where K and IQ types apply on both, the first model is the fairer one. What is done is
kept in the work folder, so a stopped benchmark continues.

    python benchmarks/engines.py --model FOLDER --wide WIDE_FOLDER --text TEXT [--kinds Q4_K_M,Q2_K] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peer_budgets import Compressor, Judge, prepare
from peers import Bench, Job, llama_cpp

from tersor import pipeline
from tersor.artifact import ArtifactWriter
from tersor.codecs import parse
from tersor.contracts import Quality
from tersor.delivery import write_file
from tersor.engines.contract import Engine, token_time
from tersor.engines.table import ENGINES
from tersor.evaluation.divergence import DivergenceAccumulator, compare_logits
from tersor.stages import finish
from tersor.stages.allocate import artifact_layout, dense_layout
from tersor.stages.encode import encode_model
from tersor.stages.verify import HEAD_TOKENS

KINDS = ("Q4_K_M", "Q2_K", "Q3_K_M", "IQ3_XXS", "Q4_0", "IQ4_XS", "Q6_K", "Q5_K_M", "IQ2_S", "IQ3_S", "IQ2_XS")
"""The files that most people take first."""
TURNS = 30
"""Times that both files generate, one after the other. Turns are short: what else a machine does changes in seconds."""


class Comparison:
    """One reference model, its text, and what has been measured of it."""

    def __init__(self, model: Path, given: argparse.Namespace) -> None:
        self.given, self.model = given, model
        self.work = given.work / model.resolve().name
        self.bench = Bench(argparse.Namespace(**{**vars(given), "model": model, "work": self.work}))
        self.engine: Engine = ENGINES["llama.cpp"]
        self.compressor: Compressor = prepare(
            model,
            self.bench.calibration,
            self.work / "tersor",
            sequences=given.sequences,
            length=given.length,
            workers=given.workers,
            engine=self.engine.name,
            candidates=self.engine.candidates("normal"),
        )
        context = self.compressor.context
        self.judge = Judge(context, self.bench.evaluation, given.text.name)
        self.target = self.engine.open(context.source, context.anatomy)
        self.larger = self.target.overhead(dense_layout(context.anatomy).total_bytes)

    def kept(self, name: str, make: Any) -> dict[str, Any]:
        """JSON in the work folder, made once."""
        path = self._row(name)
        if not path.exists():
            made = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made, indent=1) + "\n")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _row(self, name: str) -> Path:
        return self.work / "rows" / f"{name}_{self.bench.key}_{self.given.chunks}x{self.given.window}.json"

    def theirs(self, kind: str) -> tuple[Path, dict[str, Any]]:
        """llama.cpp's own file of that kind."""
        folder = self.bench.quantized(Job("llama.cpp", {"type": kind, "imatrix": True}))
        (folder / "dequantized.safetensors").unlink(missing_ok=True)
        path = folder / "files" / "model.gguf"
        made = json.loads((folder / "result.json").read_text())

        def measure() -> dict[str, Any]:
            return {
                "bytes": path.stat().st_size,
                "seconds": made["seconds"],
                "cpu_seconds": made["cpu_seconds"],
                "types": made["notes"],
                "quality": asdict(self.quality(path)),
            }

        return path, self.kept(f"{kind}-theirs", measure)

    def ours(self, kind: str, theirs: Path) -> tuple[Path, dict[str, Any]]:
        """tersor's file, by its types no slower than ``theirs`` and no larger."""
        path = self.work / f"{kind}.gguf"

        def measure() -> dict[str, Any]:
            began, cpu = time.perf_counter(), time.process_time()
            types = self._write(path, theirs)
            return {
                "bytes": path.stat().st_size,
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu,
                "types": types,
                "quality": asdict(self.quality(path)),
            }

        row = self.kept(f"{kind}-ours", measure)
        if not path.exists():
            self._write(path, theirs)
        assert row["bytes"] <= theirs.stat().st_size
        return path, row

    def _write(self, path: Path, theirs: Path) -> dict[str, float]:
        """Make the file; the share of the weights that each type has."""
        context = self.compressor.context
        stored = self.target.stored(theirs)
        most = token_time(self.engine, context.anatomy, stored.texts)
        limited = replace(context, options=replace(context.options, token_time=most))
        plan = replace(self.compressor, context=limited).sized(stored.nbytes - self.larger)
        codecs = {name: parse(choice.codec) for name, choice in plan.layers.items()}
        folder = self.work / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        for left in context.work.folder.glob("encode-*"):
            left.unlink()
        with ArtifactWriter(folder, artifact_layout(context.anatomy, codecs), {"benchmark": "engines"}) as writer:
            encode_model(context, codecs, writer, self.compressor.texts.calibration.ids)
            units = {layer.name: dict(writer.record(layer.name)) for layer in context.anatomy.layers}
            writer.finish()
        finish.write_folder(context, folder, plan, codecs, units, self.compressor.texts)
        write_file(folder, path, self.target)
        shutil.rmtree(folder)
        shares: dict[str, float] = {}
        for layer in context.anatomy.layers:
            text = plan.layers[layer.name].codec
            shares[text] = shares.get(text, 0) + layer.parameters / context.anatomy.parameters
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def quality(self, path: Path) -> Quality:
        """Of a file as llama.cpp runs it, against the reference in float32."""
        ids, judge = self.bench.evaluation, self.judge
        reference = judge.reference()
        total = DivergenceAccumulator()
        with reference.head_module(), self.engine.run(path, ids.shape[1], self.given.workers) as running:
            for row, window in enumerate(ids):
                found = running.logits(window.tolist())[:-1]
                compared = None
                for start in range(0, len(found), HEAD_TOKENS):
                    here = slice(start, start + HEAD_TOKENS)
                    with torch.no_grad():
                        wanted = reference.head(judge.states[0][row : row + 1, :-1][:, here])[0].float()
                    piece = compare_logits(wanted, found[here], window[1:][here])
                    compared = piece if compared is None else compared + piece
                assert compared is not None
                total.add(compared)
        reference.close()
        return total.quality(self.given.text.name)

    def speed(self, kind: str, files: tuple[Path, Path]) -> dict[str, Any] | None:
        """Tokens a second of both files, in turn, by llama.cpp's own program. None where that is not to be measured
        now, and was not before."""
        name = f"{kind}-speed"
        if self.given.no_speed and not self._row(name).exists():
            return None

        def measure() -> dict[str, Any]:
            program = bench_program(llama_cpp(self.given.tools))
            speeds: tuple[list[float], list[float]] = ([], [])
            for _ in range(TURNS):
                for path, found in zip(files, speeds, strict=True):
                    command = [str(program), "-m", str(path), "-p", "0", "-n", "32", "-r", "2", "-o", "json"]
                    command += ["-t", str(self.given.workers), "-ngl", "0"]
                    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    found.append(json.loads(answer)[0]["avg_ts"])
            theirs, ours = (statistics.median(one) for one in speeds)
            ratio, error = typical([second / first for first, second in zip(*speeds, strict=True)])
            return {"theirs": theirs, "ours": ours, "ratio": ratio, "error": error, "all": speeds}

        return self.kept(name, measure)


def typical(values: list[float]) -> tuple[float, float]:
    """The median and its standard error, from the median distance to it as of normal numbers."""
    middle = statistics.median(values)
    return middle, 1.253 * 1.483 * statistics.median(abs(one - middle) for one in values) / len(values) ** 0.5


def bench_program(home: Path) -> Path:
    """llama.cpp's benchmark of itself, built when it is not there."""
    build = home / "build"
    if not (build / "bin" / "llama-bench").exists():
        command = ["cmake", "--build", str(build), "--target", "llama-bench", "--parallel", str(os.cpu_count() or 1)]
        subprocess.run(command, check=True)
    return build / "bin" / "llama-bench"


def table(result: dict[str, Any]) -> str:
    """All rows as Markdown."""
    lines = [
        "# GGUF files of the same size, both run by llama.cpp",
        "",
        f"Calibration: {result['calibration']}. Evaluation: {result['evaluation']}. KL in nats per token against the "
        "float32 reference, computed by llama.cpp with both files. tersor's are made like theirs (`--like`): at most "
        "the same bytes, and by their types at most the same time a token.",
    ]
    for name, rows in result["models"].items():
        lines += ["", f"## {name}", ""]
        lines += [
            "| llama.cpp's kind | its bytes | its KL | tersor's bytes | tersor's KL | ratio | speed, ours / its |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            first, second = row["theirs"], row["ours"]
            ratio = f"{row['ratio']:.2f} ± {row['error']:.2f}"
            speed = f"{row['speed']['ratio']:.3f} ± {row['speed']['error']:.3f}" if "speed" in row else ""
            cells = [row["kind"]]
            for side in (first, second):
                quality = side["quality"]
                cells += [f"{side['bytes']:,}", f"{quality['kl']:.4f} ± {quality['kl_error']:.4f}"]
            lines.append(f"| {' | '.join([*cells, ratio, speed])} |")
    return "\n".join(lines) + "\n"


def run(given: argparse.Namespace) -> None:
    """All kinds on all models; after every step the tables of what there is."""
    result: dict[str, Any] = {"models": {}}
    for model, name in ((given.model, "re-gauged SmolLM2-135M-Instruct"), (given.wide, "the same, widened to 768")):
        if model is None:
            continue
        comparison = Comparison(model, given)
        texts, ids = comparison.compressor.texts, comparison.bench.evaluation
        result["calibration"] = f"{texts.calibration.tokens} tokens from the beginning of {given.text.name}"
        result["evaluation"] = f"{ids.numel()} tokens from its end, in windows of {given.window}"
        rows = result["models"].setdefault(name, [])
        for kind in given.kinds.split(","):
            print(f"{name}: {kind}", flush=True)
            try:
                path, theirs = comparison.theirs(kind)
            except subprocess.CalledProcessError as error:
                print(f"  llama.cpp failed with {error.returncode}; see its log", flush=True)
                continue
            made, ours = comparison.ours(kind, path)
            row = {"kind": kind, "theirs": theirs, "ours": ours}
            kls = [(side["quality"]["kl"], side["quality"]["kl_error"]) for side in (ours, theirs)]
            row["ratio"] = kls[0][0] / kls[1][0]
            row["error"] = row["ratio"] * sum((error / kl) ** 2 for kl, error in kls) ** 0.5
            speed = comparison.speed(kind, (path, made))
            if speed is not None:
                row["speed"] = speed
            rows.append(row)
            print(f"  KL {kls[1][0]:.4f} of theirs, {kls[0][0]:.4f} of ours: {row['ratio']:.2f}", flush=True)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(table(result))
    sys.stdout.write(table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the reference model")
    parser.add_argument("--wide", type=Path, help="the one whose widths 256 divides")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--sequences", type=int, default=48, help="calibration windows, for both sides")
    parser.add_argument("--length", type=int, default=512, help="tokens in each of them")
    parser.add_argument("--chunks", type=int, default=16, help="evaluation windows")
    parser.add_argument("--window", type=int, default=512, help="tokens in each of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-speed", action="store_true", help="do not generate from the files now")
    parser.add_argument("--work", type=Path, default=Path("out/engines"))
    parser.add_argument("--tools", type=Path, default=Path("out/tools"), help="where llama.cpp is built")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engines.json")
    with pipeline.one_thread_each():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
