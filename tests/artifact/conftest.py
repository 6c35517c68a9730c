"""Shared by the artifact's tests: the maker of golden artifacts, as a module, and a small artifact to damage."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_artifacts", GOLDEN / "make_artifacts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_artifacts"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses no written page; tests of what is *written* use this, for speed."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def small(tmp_path: Path, maker: ModuleType) -> Path:
    """A good artifact in one file."""
    maker.build(tmp_path / "small", maker.small_layers(), maker.small_kept())
    return tmp_path / "small"
