"""What tests of several folders share. This file also puts ``tests`` on the path: ``import tiny_models`` works."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny_models
import tiny_runs


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tests run in parallel as processes; more threads in each would only be in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Family name (and keyword arguments of its configuration) to a model folder, made once."""

    @functools.cache
    def make(family: str, *, shard: str = "1GB", dtype: torch.dtype = torch.float32, **options: object) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny_models.build(family, dtype=dtype, **options).save_pretrained(folder, max_shard_size=shard)
        return folder

    return make


@pytest.fixture(scope="session")
def complete(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Family name to a model folder with a tokenizer, made once; copy it before changing it."""

    @functools.cache
    def make(family: str, **options: object) -> Path:
        return tiny_runs.with_tokenizer(tiny(family, **options), tmp_path_factory.mktemp(f"{family}-complete"))

    return make


@pytest.fixture(scope="session")
def small(complete: Callable[..., Path]) -> Path:
    """A model of two blocks, wide enough that its layers have many codecs to choose from."""
    return complete("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of words of random letters."""
    return tiny_runs.text(tmp_path_factory.mktemp("text") / "words.txt")
