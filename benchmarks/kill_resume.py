"""Kill a run at random moments, continue it, and compare its bytes with those of an uninterrupted one.

A run with one worker and one with two come first: their weight files must be equal too. Each trial then starts anew,
is killed (SIGKILL) after a random share of the time that an uninterrupted run took, and is continued by the same
command. No block that was finished may be begun again in the same stage.

    python benchmarks/kill_resume.py --model FOLDER --text FILE --work FOLDER [--trials 10] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMPARED = ("model.safetensors", "plan.json", "config.json", "calibration.safetensors")


def command(options: argparse.Namespace, output: Path, workers: int) -> list[str]:
    settings = {
        "--output": output,
        "--size": options.size,
        "--text": options.text,
        "--sequences": options.sequences,
        "--length": options.length,
        "--eval-sequences": 4,
        "--workers": workers,
    }
    flat = [str(word) for pair in settings.items() for word in pair]
    return [sys.executable, "-m", "tersor", "compress", str(options.model), *flat, "--json"]


def finished(words: list[str]) -> float:
    """Run to the end; its seconds."""
    began = time.perf_counter()
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def killed(words: list[str], seconds: float) -> bool:
    """Start a run and kill it after some time; whether it was still running then."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in COMPARED}


def log_of(output: Path) -> Path | None:
    """The log of events of an unfinished run, under a second name that outlives it."""
    for log in output.parent.glob(f"*{output.name}*/.state/work/events.jsonl"):
        kept = output.parent / f"{output.name}-events.jsonl"
        if not kept.exists():
            os.link(log, kept)
        return kept
    return None


def repeated(log: Path) -> list[str]:
    """Blocks that were begun again although they had been finished."""
    done: set[tuple[Any, ...]] = set()
    again = []
    for line in log.read_text().splitlines():
        event = json.loads(line)
        key = (event.get("stage"), event.get("way"), event.get("block"))
        if event.get("event") == "block done":
            done.add(key)
        elif event.get("event") == "block begun" and key in done:
            again.append(" ".join(map(str, key)))
    return again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--size", default="25%")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_resume.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    expected: dict[str, str] = {}
    seconds = 0.0
    for workers in (1, 2):
        output = options.work / f"whole-{workers}"
        shutil.rmtree(output, ignore_errors=True)
        seconds = finished(command(options, output, workers))
        found = digests(output)
        expected = expected or found
        sys.stdout.write(f"{workers} workers: {seconds:.0f} s, {'equal' if found == expected else 'DIFFERENT'}\n")
        if found != expected:
            sys.exit("one and two workers gave different bytes")
    generator = random.Random(options.seed)
    trials = []
    for trial in range(options.trials):
        output = options.work / f"trial-{trial}"
        words = command(options, output, 1 + trial % 2)
        after = generator.uniform(0.03, 0.97) * seconds
        stopped = killed(words, after)
        log = log_of(output)
        finished([*words, *([] if stopped else ["--overwrite"])])
        again = repeated(log) if log else []
        equal = digests(output) == expected
        trials.append({"killed_after": round(after, 1), "killed": stopped, "equal": equal, "repeated": again})
        sys.stdout.write(f"trial {trial}: killed after {after:.0f} s, {'equal' if equal else 'DIFFERENT'}, {again}\n")
        sys.stdout.flush()
        shutil.rmtree(output)
        options.out.write_text(
            json.dumps(
                {"whole_seconds": round(seconds, 1), "workers": [1, 2], "sha256": expected, "trials": trials}, indent=1
            )
            + "\n"
        )
    if any(not trial["equal"] or trial["repeated"] for trial in trials):
        sys.exit("a continued run differs from an uninterrupted one")


if __name__ == "__main__":
    main()
