"""A share of a quantized source: of which bytes is said wherever the budget is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny_packed
import tiny_runs
from tersor import api
from tersor.cli import app

pytest.importorskip("compressed_tensors")
SETTINGS = {"bits": 4, "group_size": 16, "quant_method": "gptq", "desc_act": False}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    model = tiny_runs.wide_model(tmp_path)
    made = tiny_packed.write(
        model,
        tmp_path / "packed",
        SETTINGS,
        lambda weight: tiny_packed.round_off(weight, 4, 16, order=False, dtype=torch.bfloat16),
        lambda rounded: tiny_packed.gptq(rounded, 4),
    )
    return made.folder


@pytest.mark.parametrize("engine", ["transformers", "compressed-tensors"])
def test_a_plan_says_of_which_bytes(engine: str, packed: Path, tmp_path: Path) -> None:
    given = {"fast": True, "engine": engine, "cache_dir": tmp_path / "cache"}
    planned = api.plan(packed, size="70%", **given)
    full = sum(path.stat().st_size for path in (tmp_path / "model-llama").glob("*.safetensors"))
    (note,) = (note for note in planned.notes if "is a share of" in note)
    assert planned.anatomy.source_bytes < full < planned.anatomy.source_bytes + 10_000
    assert note == (
        f"--size 70% is a share of the {planned.anatomy.source_bytes:,} bytes that the source's weights take unpacked "
        f"({planned.plan.budget:,} bytes), not of its files, which are GPTQ 4-bit g16."
    )
    for model, size in ((packed, planned.plan.budget), (tmp_path / "model-llama", "70%")):
        assert not any("is a share of" in note for note in api.plan(model, size=size, **given).notes)


def test_the_command_says_so(packed: Path, words: Path, tmp_path: Path) -> None:
    options = ["--text", str(words), *tiny_runs.OPTIONS, "--candidates", "int8:row,bf16"]
    done = CliRunner().invoke(app, ["compress", str(packed), "--size", "90%", "-o", str(tmp_path / "x"), *options])
    assert done.exit_code == 0, done.output
    assert "--size 90% is a share of the" in done.stdout
    said = " ".join(CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "300"}).stdout.split())
    assert "of a quantized one, of its weights unpacked to 16 bits" in said
