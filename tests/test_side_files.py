"""Files beside the weights reach an artifact under the paths that they had, those in subfolders too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_runs
from tersor import api
from tersor.anatomy import open_source
from tersor.artifact import open_artifact

TEMPLATES = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "tools: {{ messages }}",
    "additional_chat_templates/rag.jinja": "documents: {{ messages }}",
}


@pytest.fixture
def model(complete: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with several chat templates, as transformers saves them."""
    folder = tmp_path / "model"
    shutil.copytree(complete("llama"), folder)
    for name, text in TEMPLATES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_an_artifact_keeps_templates_in_their_folders(model: Path, words: Path, tmp_path: Path) -> None:
    given = {"text": words, "cache_dir": tmp_path / "cache", **tiny_runs.SETTINGS}
    api.compress(model, tmp_path / "out", size="60%", candidates=("int4:row", "bf16"), **given)
    assert {name: (tmp_path / "out" / name).read_text() for name in TEMPLATES} == TEMPLATES
    assert not (tmp_path / "out" / "rag.jinja").exists()
    assert set(TEMPLATES) <= set(open_artifact(tmp_path / "out").manifest.files)
    templates = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert set(templates) == {"default", "tool_use", "rag"}


def test_a_model_object_brings_them_too(model: Path, tmp_path: Path) -> None:
    source = open_source(AutoModelForCausalLM.from_pretrained(model), cache_dir=tmp_path / "cache")
    assert set(TEMPLATES) <= {file.relative_to(source.path).as_posix() for file in source.side_files}
