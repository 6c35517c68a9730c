"""Whole runs on tiny models, for tests: a model folder with a tokenizer, a text, and settings that take a second."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import tiny_tokenizer

SETTINGS: dict[str, Any] = {
    "sequences": 4,
    "length": 32,
    "eval_sequences": 2,
    "samples": 0,
    "workers": 1,
    "dtype": "float32",
}

OPTIONS = ("--sequences", "4", "--length", "32", "--eval-sequences", "2", "--samples", "0", "--workers", "1")
"""Settings for the command line; its default type is kept."""


def text(path: Path, *, seed: int = 0, letters: str = "abcdefgh ijklmnop,.;", words: int = 3000) -> Path:
    """A file of words of random letters."""
    draw = random.Random(seed)
    path.write_text(" ".join("".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(words)))
    return path


def with_tokenizer(model: Path, folder: Path) -> Path:
    """A copy of a model's folder in ``folder``, with a tokenizer of one token a character."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tiny_tokenizer.build().save_pretrained(folder)
    return folder
