"""How far ahead of other compressors? Their files and tersor's, of the same size, against the same reference.

Each peer is installed in an environment of its own, quantizes the model with the same calibration text, and leaves the
weights that its files stand for (``peers/``). One evaluator, tersor's, measures all of them in float32 on the same
held-out windows. Then tersor compresses the model to the size of every peer's file, embeddings counted as each stores
them, and, with the embedding left in bfloat16 on both sides, to every peer's bits per weight on the decoder's linear
layers. What is done is kept in the work folder, so a stopped benchmark continues; a peer that could not be installed or
failed is in the table with its error.

    python benchmarks/peers.py --model MODEL_FOLDER --text TEXT [--peers gptqmodel,hqq] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from peer_budgets import Judge, feedback_speed, prepare
from peer_table import markdown, summary
from transformers import AutoTokenizer

from tersor import pipeline

HERE = Path(__file__).parent
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Its source package holds all of llama.cpp."""
LLAMA_OPTIONS = ("BUILD_SHARED_LIBS", "LLAMA_CURL", "LLAMA_OPENSSL", "GGML_OPENMP", "LLAMA_BUILD_TESTS")
LLAMA_OPTIONS += ("LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_UI")
LLAMA_OPTIONS += ("GGML_AMX_TILE", "GGML_AMX_INT8", "GGML_AMX_BF16")
"""Left out: not needed here, or (the last three) crashing on some virtual machines."""


@dataclass(frozen=True)
class Peer:
    """``script``: in ``peers/``. ``packages``: what its environment holds besides torch."""

    script: str
    packages: tuple[str, ...]


PEERS = {
    "llama.cpp": Peer("llama_cpp.py", ("transformers", "safetensors", "gguf", "sentencepiece", "protobuf")),
    "gptqmodel": Peer("gptq_model.py", ("gptqmodel",)),
    "hqq": Peer("half_quadratic.py", ("hqq", "transformers", "accelerate")),
    "llmcompressor": Peer("llm_compressor.py", ("llmcompressor",)),
    "auto-round": Peer("sign_round.py", ("auto-round",)),
}


@dataclass(frozen=True)
class Job:
    """One setting of one peer. ``calibrated``: whether it reads the calibration text."""

    peer: str
    settings: Mapping[str, Any] = field(hash=False)
    calibrated: bool = True

    @property
    def title(self) -> str:
        return " ".join([self.peer, *(f"{key}={value}" for key, value in self.settings.items())])


def jobs(group: int, iterations: int) -> list[Job]:
    """What is compared, the sizes that matter most first."""
    llama = [Job("llama.cpp", {"type": kind, "imatrix": kind != "Q4_0"}) for kind in ("Q4_K_M", "Q4_0", "Q2_K")]
    gptq = [Job("gptqmodel", {"bits": bits, "group": group}) for bits in (4, 3, 2)]
    hqq = [Job("hqq", {"bits": bits, "group": group}, calibrated=False) for bits in (4, 3)]
    compressor = [Job("llmcompressor", {"bits": 3, "group": group})]
    tuned = {"bits": 2, "group": group, "symmetric": False, "iterations": iterations}
    return [*llama, *gptq, *hqq, *compressor, Job("auto-round", tuned)]


def installed(peer: str, work: Path) -> Path:
    """The Python of a peer's environment, made when it is not there. Raises CalledProcessError when that fails."""
    folder = work / "venv" / peer
    python = folder / "bin" / "python"
    done = folder / ".installed"
    wanted = " ".join(PEERS[peer].packages)
    if done.exists() and done.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and held: what comes after takes the build that is there, not one with gigabytes of other devices.
    constraints = (HERE.parent / "constraints.txt").read_text().split("\n")
    torch_held = next(line for line in constraints if line.startswith("torch="))
    held = work / "torch.txt"
    held.write_text(torch_held + "\n")
    subprocess.run([*install, torch_held, "numpy", "setuptools", "wheel"], check=True)
    subprocess.run([*install, "--constraint", str(held), *PEERS[peer].packages], check=True)
    done.write_text(wanted)
    return python


def llama_cpp(work: Path) -> Path:
    """llama.cpp's source folder with its quantizer built. Needs CMake and a C++ compiler."""
    home = work / "llama.cpp"
    source = home / "vendor" / "llama.cpp"
    if not source.exists():
        fetched = work / "fetched"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", LLAMA_CPP]
        subprocess.run([*pip, "--dest", str(fetched)], check=True)
        with tarfile.open(next(fetched.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work / "unpacked", filter="data")
        shutil.move(next((work / "unpacked").iterdir()), home)
    build = source / "build"
    if not (build / "bin" / "llama-imatrix").exists():
        options = [f"-D{name}=OFF" for name in LLAMA_OPTIONS]
        subprocess.run(
            ["cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *options], check=True
        )
        targets = ["--target", "llama-quantize", "llama-imatrix", "--parallel", str(os.cpu_count() or 1)]
        subprocess.run(["cmake", "--build", str(build), *targets], check=True)
    return source


class Bench:
    """The benchmark's folder and what is in it already."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.work: Path = given.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.tools: Path = given.tools
        self.calibration, ids = split_text(given)
        self.evaluation = ids
        key = f"{given.sequences}x{given.length}|{self.calibration.read_text()}"
        self.key = hashlib.sha256(key.encode()).hexdigest()[:8]

    def quantized(self, job: Job) -> Path:
        """A folder with a peer's result, made when it is not there. Raises CalledProcessError when the peer fails."""
        settings = dict(job.settings)
        if job.calibrated:
            settings |= {"sequences": self.given.sequences, "length": self.given.length}
        name = re.sub(r"[^\w.=-]+", "_", job.title) + (f"_{self.key}" if job.calibrated else "")
        folder = self.work / "jobs" / name
        if (folder / "result.json").exists():
            return folder
        python = installed(job.peer, self.tools)
        if job.peer == "llama.cpp":
            settings |= {"home": str(llama_cpp(self.tools).resolve()), "version": LLAMA_CPP}
        folder.mkdir(parents=True, exist_ok=True)
        script = HERE / "peers" / PEERS[job.peer].script
        command = [str(python), str(script), "--model", str(self.given.model.resolve())]
        command += ["--text", str(self.calibration.resolve()), "--out", str(folder.resolve())]
        command += ["--settings", json.dumps(settings), "--threads", str(self.given.workers)]
        threads = {"OMP_NUM_THREADS": str(self.given.workers), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # Its own kernels compiled on the way need the environment's tools; no home of the user's is read or written.
        path = {"PATH": f"{python.parent.resolve()}{os.pathsep}{os.environ['PATH']}"}
        with (folder / "log.txt").open("w") as log:
            subprocess.run(
                command, check=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads, **path}
            )
        return folder

    def measured(self, job: Job, judge: Judge) -> dict[str, Any]:
        """A row of the table: what a peer made and how good it is."""
        row: dict[str, Any] = {"peer": job.peer, "settings": dict(job.settings), "title": job.title}
        print(job.title, flush=True)
        try:
            folder = self.quantized(job)
        except subprocess.CalledProcessError as error:
            reason = self._reason(error)
            print(f"  failed: {reason}", flush=True)
            return {**row, "error": reason}
        row |= json.loads((folder / "result.json").read_text())
        # Only llama.cpp stores the embedding otherwise than the source does.
        for case in ("quality", "quality_linears") if job.peer == "llama.cpp" else ("quality",):
            row[case] = self._kept(
                folder / f"{case}.json",
                lambda case=case: self._judged(folder, judge, linears_only=case == "quality_linears"),
            )
        row.setdefault("quality_linears", row["quality"])
        if not self.given.keep:
            (folder / "dequantized.safetensors").unlink(missing_ok=True)
        return row

    def ours(self, case: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """tersor's result for one budget, kept by the text it was calibrated on."""
        print(f"tersor, {case}", flush=True)
        return self._kept(self.work / "tersor" / f"{case}_{self.key}.json", make)

    @staticmethod
    def _reason(error: subprocess.CalledProcessError) -> str:
        """What a failed command says of itself: its exit code, and the last line that a peer's script wrote."""
        command = [str(word) for word in error.cmd]
        reason = f"{Path(command[0]).name} {' '.join(command[1:4])} ended with {error.returncode}"
        if "--out" not in command:
            return reason
        log = Path(command[command.index("--out") + 1]) / "log.txt"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{Path(command[1]).name} ended with {error.returncode}: {lines[-1].strip()[-200:] if lines else ''}"

    def _judged(self, folder: Path, judge: Judge, *, linears_only: bool) -> dict[str, Any]:
        view = self.work / "view"
        shutil.rmtree(view, ignore_errors=True)
        view.mkdir()
        shutil.copy(self.given.model / "config.json", view)
        (view / "model.safetensors").symlink_to((folder / "dequantized.safetensors").resolve())
        return asdict(judge.folder(view, linears_only=linears_only))

    def _kept(self, path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """JSON at ``path``, made once for each evaluation text."""
        path = path.with_stem(f"{path.stem}_{self.given.chunks}x{self.given.window}")
        if not path.exists():
            made = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made, indent=1) + "\n")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def split_text(given: argparse.Namespace) -> tuple[Path, torch.Tensor]:
    """The calibration text, from the beginning, and token ids ``(chunks, window)`` from the end; they are disjoint."""
    content = given.text.read_text()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    # Cut at a line end, a little after the tokens that are wanted: every tool puts its own marks around the text.
    marks = tokenizer(content, return_offsets_mapping=True, verbose=False)
    wanted = given.sequences * given.length + given.length // 4
    total = len(marks["input_ids"])
    need = given.chunks * given.window
    if wanted + need > total:
        raise SystemExit(f"{given.text} has {total} tokens, {wanted + need} are needed; ask for fewer.")
    end = content.index("\n", marks["offset_mapping"][wanted][1])
    path = given.work / f"calibration-{given.sequences}x{given.length}.txt"
    path.write_text(content[: end + 1])
    return path, torch.tensor(marks["input_ids"][total - need :]).reshape(given.chunks, given.window)


def budgets(rows: list[dict[str, Any]], size: str, quality: str) -> list[float]:
    """Every size that a peer has: first those at which it beats all smaller peers, as the others can only be easier."""
    made = sorted((row for row in rows if row.get(size) and quality in row), key=lambda row: row[size])
    first: list[float] = []
    best = float("inf")
    for row in made:
        if row[quality]["kl"] < best:
            best = row[quality]["kl"]
            first.append(row[size])
    first = list(dict.fromkeys(first))  # two peers may have the same size, the better one behind
    return [*first, *sorted({row[size] for row in made} - set(first))]


def speed(rows: list[dict[str, Any]], plain: dict[str, Any], refitted: dict[str, Any]) -> dict[str, Any] | None:
    """Times of the two implementations of error feedback at the same settings, and of ours with refitted scales."""
    theirs = next(
        (row for row in rows if row["peer"] == "gptqmodel" and row["settings"]["bits"] == plain["bits"]), None
    )
    if theirs is None or "seconds" not in theirs:
        return None
    parts = ("seconds", "cpu_seconds", "solving_seconds")
    found = {"gptqmodel": {part: theirs[part] for part in (*parts, "version")}}
    for name, ours in (("plain", plain), ("refitted", refitted)):
        found[name] = ours | {f"{part}_ratio": theirs[part] / ours[part] for part in parts}
    return found


def run(given: argparse.Namespace) -> None:
    """Peers, tersor, and after every step the tables of what there is."""
    bench = Bench(given)
    began = time.perf_counter()
    compressor = prepare(
        given.model,
        bench.calibration,
        given.work / "tersor",
        sequences=given.sequences,
        length=given.length,
        workers=given.workers,
    )
    spent = time.perf_counter() - began
    judge = Judge(compressor.context, bench.evaluation, given.text.name)
    result: dict[str, Any] = {
        "model": "re-gauged SmolLM2-135M-Instruct (benchmarks/reference_model.py)",
        "calibration": f"{compressor.texts.calibration.tokens} tokens from the beginning of {given.text.name}",
        "evaluation": f"{bench.evaluation.numel()} tokens from its end, in windows of {given.window}",
        "effort": compressor.context.options.effort,
        # What the first run took: later ones find it done.
        "preparation": bench.ours("preparation", lambda: {"seconds": spent}),
        "rows": [],
        "ours": [],
        "ours_linears": [],
    }

    def record() -> None:
        result.update(summary(result["rows"], result["ours"], result["ours_linears"]))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(markdown(result))

    wanted = given.peers.split(",") if given.peers else list(PEERS)
    for job in jobs(given.group, given.iterations):
        if job.peer in wanted:
            result["rows"].append(bench.measured(job, judge))
            record()
    plain, refitted = (
        bench.ours(name, lambda refit=refit: feedback_speed(compressor, 4, given.group, refit=refit))
        for name, refit in (("feedback plain", False), ("feedback refitted", True))
    )
    result["speed"] = speed(result["rows"], plain, refitted)
    sizes = budgets(result["rows"], "file_bytes", "quality")
    rates = budgets(result["rows"], "bits_per_weight", "quality_linears")
    whole = [("ours", f"size {size}", partial(compressor.sized, int(size))) for size in sizes]
    linears = [("ours_linears", f"linears {rate:.5f}", partial(compressor.linears, rate)) for rate in rates]
    # In turn, so that a run that is stopped has something of both.
    cases = [case for both in zip_longest(whole, linears) for case in both if case is not None]
    for kind, case, plan in cases:
        result[kind].append(bench.ours(case, lambda plan=plan: compressor.encode(plan(), judge)))
        record()
    print(given.out.with_suffix(".md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peers", help="some of " + ",".join(PEERS))
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=40, help="AutoRound's, for each block")
    parser.add_argument("--sequences", type=int, default=48, help="calibration windows, for all sides")
    parser.add_argument("--length", type=int, default=512, help="tokens in each of them")
    parser.add_argument("--chunks", type=int, default=16, help="evaluation windows")
    parser.add_argument("--window", type=int, default=1024, help="tokens in each of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", action="store_true", help="leave the dequantized weights, half a gigabyte each")
    parser.add_argument("--work", type=Path, default=Path("out/peers"))
    parser.add_argument("--tools", type=Path, default=Path("out/tools"), help="where the peers are installed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    with pipeline.one_thread_each():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
