"""Whole runs on tiny models, for tests: a model folder with a tokenizer, a text, and settings that take a second."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch

import byte_tokenizer
import tiny_models
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


def wide_model(parent: Path, family: str = "llama", **options: object) -> Path:
    """A folder in ``parent`` with a model whose widths the groups and words of other engines divide."""
    folder = parent / f"model-{family}"
    widths = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    tiny_models.build(family, **{**widths, **options}).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer.tokenizer().save_pretrained(folder)
    return folder
